"""The batcher: rows to whom they belong, errors to the texts that caused them, work given back."""

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from threading import Event

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as laws
from hypothesis import strategies as st

from sutra_tasks.encoding.batcher import Batch, Batcher, Drained, Encoded, TextError
from sutra_tasks.encoding.batching import Limits
from sutra_tasks.encoding.encoder import Card, TokenizedText
from sutra_tasks.vectors import Floats

LIMITS = Limits(max_tokens=1000, max_texts=8, max_wait_s=0)
ONE_BY_ONE = Limits(max_tokens=1000, max_texts=1, max_wait_s=0)
WITHIN_S = 10


class FakeEncoder:
    """Text n becomes the row [n, n]; a closed gate holds it up, and ``bad`` texts fail it."""

    def __init__(self, *, bad: Collection[int] = (), before: Callable[[], None] = lambda: None):
        self.card = Card(model="fake", space="fake:2", width=2, window=512, prompts={})
        self.batches: list[list[int]] = []
        self.began, self.gate = Event(), Event()
        self.gate.set()
        self._bad, self._before = bad, before

    def tokenize(self, texts: Sequence[str], prompt: str | None) -> list[TokenizedText]:
        raise NotImplementedError

    def encode(self, batch: Sequence[TokenizedText]) -> Floats:
        numbers = [text.content for text in batch]
        self.batches.append(numbers)
        self.began.set()
        assert self.gate.wait(WITHIN_S)
        self._before()
        if any(n in self._bad for n in numbers):
            raise ValueError(numbers)
        return np.array([[n, n] for n in numbers], dtype=np.float32)


def texts(*numbers: int, tokens: int = 5) -> list[TokenizedText]:
    return [TokenizedText(tokens, truncated=False, content=n) for n in numbers]


def taken(batcher: Batcher) -> list[int]:
    return [text.content for _, text, _ in batcher._take()]


def numbers_of(future: Future[Encoded]) -> list[float]:
    rows = future.result(WITHIN_S).rows
    assert rows[:, 0].tolist() == rows[:, 1].tolist()
    found: list[float] = rows[:, 0].tolist()
    return found


@contextmanager
def running(encoder: FakeEncoder, limits: Limits = LIMITS, **options: object) -> Iterator[Batcher]:
    batcher = Batcher(encoder, limits, **options)  # type: ignore[arg-type]
    batcher.start()
    try:
        yield batcher
    finally:
        encoder.gate.set()
        batcher.close(WITHIN_S)
        assert not batcher._thread.is_alive()


@contextmanager
def busy(encoder: FakeEncoder, limits: Limits = LIMITS) -> Iterator[Batcher]:
    """A batcher whose encoder is held up inside a batch of one text, number 0."""
    encoder.gate.clear()
    with running(encoder, limits) as batcher:
        batcher.submit(texts(0))
        assert encoder.began.wait(WITHIN_S)
        yield batcher


@laws(max_examples=30, deadline=None)
@given(
    jobs=st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=8), max_size=5),
    max_texts=st.integers(1, 8),
    max_tokens=st.integers(1, 200),
)
def test_rows_come_back_in_the_order_they_were_submitted(
    jobs: list[list[int]], max_texts: int, max_tokens: int
) -> None:
    seen: list[Batch] = []
    encoder = FakeEncoder()
    with running(encoder, Limits(max_tokens, max_texts, 0), on_batch=seen.append) as batcher:
        futures = [
            batcher.submit([TokenizedText(n, truncated=False, content=n) for n in job]) for job in jobs
        ]
        assert [numbers_of(future) for future in futures] == jobs
        assert batcher.waiting_texts == 0
    assert sum(batch.texts for batch in seen) == sum(map(len, jobs))
    assert sum(batch.tokens for batch in seen) == sum(map(sum, jobs))


def test_what_is_submitted_while_a_batch_computes_meets_in_the_next() -> None:
    encoder = FakeEncoder()
    with busy(encoder) as batcher:
        futures = [batcher.submit(texts(n)) for n in (1, 2, 3)]
        assert batcher.waiting_texts == 3
        encoder.gate.set()
        assert [numbers_of(future) for future in futures] == [[1], [2], [3]]
    assert [sorted(batch) for batch in encoder.batches] == [[0], [1, 2, 3]]


@pytest.mark.parametrize(("bad", "position"), [(3, 0), (4, 1), (5, 2)])
def test_an_error_belongs_to_the_text_that_caused_it(bad: int, position: int) -> None:
    encoder = FakeEncoder(bad={bad})
    with busy(encoder) as batcher:
        good, failing, other = (batcher.submit(texts(*job)) for job in [(1, 2), (3, 4, 5), (6,)])
        encoder.gate.set()
        with pytest.raises(TextError) as failed:
            failing.result(WITHIN_S)
        assert numbers_of(good) == [1, 2]
        assert numbers_of(other) == [6]
    assert failed.value.position == position
    assert failed.value.cause.args == ([bad],)  # raised for this text alone


def test_the_batcher_goes_on_when_every_text_fails() -> None:
    with running(FakeEncoder(bad=range(8))) as batcher:
        failing = [batcher.submit(texts(*range(8))), batcher.submit(texts(7))]
        assert all(isinstance(future.exception(WITHIN_S), TextError) for future in failing)
        assert numbers_of(batcher.submit(texts(8))) == [8]


def test_the_other_texts_of_a_failed_job_are_not_computed() -> None:
    encoder = FakeEncoder(bad={9})
    with busy(encoder, Limits(max_tokens=1000, max_texts=2, max_wait_s=0)) as batcher:
        failing = batcher.submit(texts(9, tokens=6) + texts(*range(10, 20)))  # the longest is first
        encoder.gate.set()
        assert isinstance(failing.exception(WITHIN_S), TextError)
        assert batcher.waiting_texts == 0
        assert numbers_of(batcher.submit(texts(1))) == [1]
    computed = {n for batch in encoder.batches for n in batch}
    assert len(computed & set(range(10, 20))) <= 1


def test_draining_gives_back_what_has_not_begun_and_finishes_what_has() -> None:
    encoder = FakeEncoder()
    encoder.gate.clear()
    with running(encoder, ONE_BY_ONE) as batcher:
        begun = batcher.submit(texts(1, 2, 3))
        assert encoder.began.wait(WITHIN_S)
        waiting = batcher.submit(texts(4))
        batcher.drain()
        assert isinstance(waiting.exception(0), Drained)
        assert isinstance(batcher.submit(texts(5)).exception(0), Drained)
        assert not begun.done()
        encoder.gate.set()
        assert numbers_of(begun) == [1, 2, 3]
    assert not {4, 5} & {n for batch in encoder.batches for n in batch}


def test_closing_finishes_what_has_begun() -> None:
    encoder = FakeEncoder()
    with running(encoder, ONE_BY_ONE) as batcher:
        future = batcher.submit(texts(1, 2, 3))
        assert encoder.began.wait(WITHIN_S)
    assert numbers_of(future) == [1, 2, 3]
    assert isinstance(batcher.submit(texts(4)).exception(0), Drained)


def test_an_idle_batcher_closes() -> None:
    with running(FakeEncoder()):
        pass


def test_a_batch_waits_for_work_that_was_announced() -> None:
    encoder = FakeEncoder()
    with running(encoder, Limits(max_tokens=1000, max_texts=8, max_wait_s=60)) as batcher:
        batcher.announce()
        batcher.announce()
        futures = [batcher.submit(texts(1))]
        batcher.arrived()
        assert not encoder.began.wait(0.01)
        futures.append(batcher.submit(texts(2)))
        batcher.arrived()
        assert not wait(futures, WITHIN_S).not_done
    assert [sorted(batch) for batch in encoder.batches] == [[1, 2]]


def test_a_batch_waits_no_longer_than_its_limit() -> None:
    with running(FakeEncoder(), Limits(max_tokens=1000, max_texts=8, max_wait_s=0.002)) as batcher:
        batcher.announce()
        assert numbers_of(batcher.submit(texts(1))) == [1]


def test_a_full_batch_does_not_wait() -> None:
    encoder = FakeEncoder()
    with running(encoder, Limits(max_tokens=1000, max_texts=2, max_wait_s=60)) as batcher:
        batcher.announce()
        first = batcher.submit(texts(1))
        assert not encoder.began.wait(0.01)
        assert numbers_of(batcher.submit(texts(2))) == [2]
        assert numbers_of(first) == [1]


def test_a_single_lets_a_large_job_overtake_it_once() -> None:
    batcher = Batcher(FakeEncoder(), LIMITS)  # not started: batches are taken by hand
    batcher.submit(texts(*range(100), tokens=100))
    assert len(taken(batcher)) == 8
    batcher.submit(texts(1000))
    assert 1000 not in taken(batcher)
    assert taken(batcher) == [1000]
    assert len(taken(batcher)) == 8


def test_a_job_that_finishes_overtakes_nobody() -> None:
    batcher = Batcher(FakeEncoder(), LIMITS)
    for job in (texts(1, tokens=100), texts(*range(10, 20), tokens=400), texts(2)):
        batcher.submit(job)
    assert taken(batcher) == [1]
    assert len(set(taken(batcher)) & set(range(10, 20))) == 2
    assert taken(batcher) == [2]


def test_waiting_and_computing_are_told_apart() -> None:
    now = [100.0]

    def a_second_passes() -> None:
        now[0] += 1.0

    encoder = FakeEncoder(before=a_second_passes)
    encoder.gate.clear()
    with running(encoder, ONE_BY_ONE, clock=lambda: now[0]) as batcher:
        first = batcher.submit(texts(1))
        assert encoder.began.wait(WITHIN_S)
        second = batcher.submit(texts(2, 3))
        encoder.gate.set()
        done = [future.result(WITHIN_S) for future in (first, second)]
    assert [(one.queue_s, one.compute_s) for one in done] == [(0, 1), (1, 2)]
