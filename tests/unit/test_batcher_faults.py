"""Engines that fail: whose fault it is, what is tried again, and what ends the process."""

import math
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as laws
from hypothesis import strategies as st

from sutra_tasks.batching import watchdog
from sutra_tasks.batching.budget import REGROWTH_S, TokenBudget
from sutra_tasks.batching.halving import encode_by_halves
from sutra_tasks.batching.jobs import Batch, DeviceBroken, Encoded, TextError
from sutra_tasks.batching.next_batch import Limits
from sutra_tasks.engines.encoder import TokenizedText
from sutra_tasks.engines.out_of_memory import is_out_of_memory
from sutra_tasks.vectors import Floats
from tests.unit.fake_engine import (
    ONE_BY_ONE,
    WITHIN_S,
    FakeEncoder,
    busy,
    numbers_of,
    running,
    texts,
)

START_S = 1000.0
SECONDS = st.floats(0, 1e6)
BUDGETS = st.builds(
    lambda max_tokens: TokenBudget(Limits(max_tokens, max_texts=9, max_wait_s=0)), st.integers(1, 9000)
)
SOME = st.sets(st.integers(0, 19), max_size=4)


def error_of(future: Future[Encoded]) -> Any:
    return future.exception(WITHIN_S)


@laws(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 80), min_size=1, max_size=20),
    bad=SOME,
    odd=SOME,
    memory=st.integers(1, 2000),
)
def test_an_error_is_that_of_a_text_by_itself_and_all_others_have_their_rows(
    lengths: list[int], bad: set[int], odd: set[int], memory: int
) -> None:
    encoder = FakeEncoder(bad=bad, odd=odd, memory=memory)
    batch = [TokenizedText(tokens, content=n) for n, tokens in enumerate(lengths)]
    outcome = encode_by_halves(encoder.encode, batch, 2)

    expected: dict[int, type[Exception]] = {}
    for n, tokens in enumerate(lengths):
        if tokens > memory:
            expected[n] = MemoryError
        elif n in bad:
            expected[n] = ValueError
        elif n in odd:
            expected[n] = FloatingPointError
    assert {n: type(error) for n, error in outcome.errors.items()} == expected
    good = set(range(len(lengths))) - set(expected)
    assert all(outcome.rows[n].tolist() == [n, n] for n in good)

    sizes = [(len(part), max(lengths[n] for n in part)) for part in encoder.batches]
    too_large = [(n * longest, longest) for n, longest in sizes if n > 1 and n * longest > memory]
    assert outcome.too_large == min(too_large, default=(None, 0))[0]
    assert all(padded // 2 >= longest for padded, longest in too_large)  # a budget has room for one
    assert len(sizes) <= 2 * len(lengths) - 1


@pytest.mark.parametrize("odd", [{0}, {0, 1, 2}])
def test_a_vector_that_is_not_finite_is_not_computed_again(odd: set[int]) -> None:
    encoder = FakeEncoder(odd=odd)
    outcome = encode_by_halves(encoder.encode, texts(0, 1, 2), 2)
    said = {n: str(error) for n, error in outcome.errors.items()}
    assert said == dict.fromkeys(odd, "the vector is not finite")
    assert len(encoder.batches) == 1


def test_infinity_is_not_finite_either() -> None:
    row: Floats = np.array([[1, -math.inf]], dtype=np.float32)
    assert isinstance(encode_by_halves(lambda _: row, texts(0), 2).errors[0], FloatingPointError)


def test_a_failed_pass_keeps_nothing_while_its_halves_are_tried() -> None:
    # torch frees the tensors of a failed pass only when nothing holds its frames.
    allocations: list[weakref.ref[Any]] = []

    def encode(batch: Sequence[TokenizedText]) -> Floats:
        assert not any(one() is not None for one in allocations)
        tensor = np.zeros(len(batch))
        allocations.append(weakref.ref(tensor))
        raise MemoryError

    outcome = encode_by_halves(encode, texts(0, 1, 2, 3), 2)
    assert [type(outcome.errors[n]) for n in range(4)] == [MemoryError] * 4
    assert len(allocations) == 7
    assert not any(one() is not None for one in allocations)


class OutOfMemoryError(RuntimeError):
    """As torch's."""


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (OutOfMemoryError("no room"), True),
        (RuntimeError("CUDA error: Out Of Memory"), True),
        (RuntimeError("err == 0. DefaultCPUAllocator: can't allocate memory: you tried ..."), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_want_of_memory_is_known_without_torch(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


@laws(max_examples=50, deadline=None)
@given(
    budget=BUDGETS,
    events=st.lists(st.tuples(SECONDS, st.integers(1, 10_000)), max_size=5),
    later_s=SECONDS,
)
def test_a_budget_is_halved_at_once_and_doubles_every_minute_to_its_limit(
    budget: TokenBudget, events: list[tuple[float, int]], later_s: float
) -> None:
    limits, now_s = budget.limits, START_S
    assert budget.at(now_s) == limits
    for after_s, padded in events:
        now_s += after_s
        before = budget.at(now_s).max_tokens
        budget = budget.out_of_memory(padded, now_s)
        assert budget.at(now_s).max_tokens == min(before, max(1, padded // 2))
    now_s += later_s
    max_tokens = budget.at(now_s).max_tokens
    assert 1 <= max_tokens <= limits.max_tokens
    assert budget.at(now_s + 1.01 * REGROWTH_S).max_tokens >= min(2 * max_tokens, limits.max_tokens)
    assert budget.at(now_s + 15 * REGROWTH_S) == limits


@pytest.mark.parametrize(
    ("after_s", "expected"),
    [(0, 1000), (59.9, 1000), (60, 2000), (119.9, 2000), (120, 4000), (180, 5000), (1e9, 5000)],
)
def test_a_budget_grows_at_the_full_minute(after_s: float, expected: int) -> None:
    budget = TokenBudget(Limits(max_tokens=5000, max_texts=9, max_wait_s=0)).out_of_memory(2000, START_S)
    assert budget.at(START_S + after_s).max_tokens == expected


def test_batches_are_smaller_after_one_that_did_not_fit_and_grow_again() -> None:
    now_s, seen = [START_S], list[Batch]()
    encoder = FakeEncoder(memory=300)
    with running(encoder, clock=lambda: now_s[0], on_batch=seen.append) as batcher:

        def sizes() -> list[int]:
            encoder.batches.clear()
            assert numbers_of(batcher.submit(texts(*range(8), tokens=100))) == list(range(8))
            return [len(batch) for batch in encoder.batches]

        assert sizes() == [8, 4, 2, 2, 4, 2, 2]
        assert sizes() == [2, 2, 2, 2]
        encoder.memory = math.inf
        now_s[0] += REGROWTH_S
        assert sizes() == [4, 4]
        now_s[0] += REGROWTH_S
        assert sizes() == [8]
    assert [batch.errors for batch in seen] == [0] * 8
    assert sum(batch.texts for batch in seen) == 32


def test_a_text_that_does_not_fit_by_itself_has_its_own_error() -> None:
    checked: list[None] = []
    encoder = FakeEncoder(memory=300)
    with running(encoder, self_check=lambda: checked.append(None)) as batcher:
        error = error_of(batcher.submit(texts(1, tokens=301)))
        assert (type(error), type(error.cause)) == (TextError, MemoryError)
        assert numbers_of(batcher.submit(texts(*range(3), tokens=100))) == [0, 1, 2]
    assert encoder.batches[1:] == [[0, 1, 2]]  # it says nothing about batches
    assert not checked  # nor about the device


def raises() -> bool:
    raise OSError


@pytest.mark.parametrize(
    ("self_check", "expected"),
    [
        (None, TextError),
        (lambda: True, TextError),
        (lambda: False, DeviceBroken),
        (raises, DeviceBroken),
    ],
)
@pytest.mark.parametrize("faults", [{"bad": {2}}, {"odd": {2}}])
def test_a_failure_is_the_devices_if_its_own_check_fails(
    self_check: Callable[[], bool] | None, expected: type[Exception], faults: Any
) -> None:
    encoder = FakeEncoder(**faults)
    with busy(encoder, self_check=self_check) as batcher:
        good, failing = batcher.submit(texts(3)), batcher.submit(texts(1, 2))
        encoder.gate.set()
        error = error_of(failing)
        assert (type(error), error.position) == (expected, 1)
        if expected is TextError:
            assert numbers_of(good) == [3]
        else:  # what a broken device gives beside a failure is not to be believed
            assert type(error_of(good)) is DeviceBroken


def test_the_device_is_checked_on_the_engines_thread_after_every_failure() -> None:
    verdicts, threads = [True, False, True], list[str]()

    def self_check() -> bool:
        threads.append(threading.current_thread().name)
        return verdicts.pop(0)

    encoder = FakeEncoder(bad={1})
    with running(encoder, self_check=self_check) as batcher:
        assert numbers_of(batcher.submit(texts(0))) == [0]
        assert not threads
        found = [type(error_of(batcher.submit(texts(1)))) for _ in range(3)]
    assert found == [TextError, DeviceBroken, TextError]
    assert threads == ["batcher"] * 3


def test_whatever_uses_the_engine_is_watched_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def set_timer(timer: int, seconds: float) -> None:
        assert (timer, seconds) in {(signal.ITIMER_REAL, 7), (signal.ITIMER_REAL, 0)}
        events.append("armed" if seconds else "disarmed")

    def self_check() -> bool:
        events.append("check")
        return True

    monkeypatch.setattr(signal, "setitimer", set_timer)
    monkeypatch.setattr(watchdog, "_handle_alarm", lambda: None)  # SIGALRM is pytest-timeout's here
    encoder = FakeEncoder(bad={1}, before=lambda: events.append("encode"))
    with running(encoder, ONE_BY_ONE, batch_timeout_s=7, self_check=self_check) as batcher:
        error_of(batcher.submit(texts(1)))
        batcher.call(lambda: events.append("call")).result(WITHIN_S)
    assert events == [
        *("armed", "encode", "disarmed"),
        *("armed", "check", "disarmed"),
        *("armed", "call", "disarmed"),
    ]


HANGING = """
import re, sys, time
from sutra_tasks.batching.batcher import Batcher
from sutra_tasks.batching.next_batch import Limits
from sutra_tasks.engines.simulated_engine import SimulatedEncoder

class Hanging(SimulatedEncoder):
    def encode(self, batch):
        if batch[0].content == "hang":
            re.match("(a+)+$", "a" * 60 + "b")  # holds the GIL: no other thread of Python's runs
        return super().encode(batch)

sys.stderr = sys.__stderr__ = None
encoder = Hanging()
batcher = Batcher(Limits(100, 8, 0), batch_timeout_s=0.3)
batcher.start()
batcher.submit(encoder.tokenize(["quick"], None), encoder=encoder).result()
time.sleep(0.4)  # longer than the timeout: it is over with the batch
print("still here", flush=True)
batcher.submit(encoder.tokenize(["hang"], None), encoder=encoder).result()
"""


def test_a_batch_that_hangs_ends_the_process_and_says_where() -> None:
    command = [sys.executable, "-c", HANGING]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (watchdog.HUNG, "still here\n")
    assert "in encode" in ended.stderr
    assert "in _compute" in ended.stderr
