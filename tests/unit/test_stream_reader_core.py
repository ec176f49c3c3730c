"""A reader without a server: every chunk comes once, and what is not handled is not acknowledged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import redis
from hypothesis import given
from hypothesis import settings as laws
from hypothesis import strategies as st

from sutra_tasks import keys
from sutra_tasks.errors import StreamFaultError
from sutra_tasks.settings import Settings
from sutra_tasks.streaming.client.reader_core import ACKNOWLEDGE, BEGIN, BLOCK_S, FETCH, ReaderCore
from sutra_tasks.streaming.client.steps import REPEAT_S, Command, RunScript, Sleep, Step, Steps, run
from sutra_tasks.streaming.responses import EmbeddedChunk, StreamingError, StreamingResponse

OPTIONS = Settings(broker_url="redis://unused")
CLAIM_S = 30.0


class FakeOutput:
    """Takes the steps of readers as a server would; time passes only while somebody waits."""

    def __init__(self, *responses: str) -> None:
        self.now, self.slept, self.commands = 1000.0, list[float](), list[str]()
        self.has_group, self.exists = False, True
        self.new: list[tuple[bytes, Any]] = []
        self.pending: dict[bytes, tuple[Any, float]] = {}
        self.acknowledged: list[bytes] = []
        self.lost: Iterator[Exception | None] = iter(())
        self.claimed_at: list[float] = []
        self.while_silent: Callable[[], object] = lambda: None
        for names in responses:
            self.respond(*names)

    def clock(self) -> float:
        return self.now

    def respond(self, *names: str) -> None:
        """Write a response of so many chunks."""
        chunks = [EmbeddedChunk(name, name, None, 0, 0, 1, False, False, None, 1) for name in names]
        fields = {
            b"v": b"1", b"kind": b"response", b"space": b"m:1", b"model": b"m", b"device": b"g0",
            b"latency_ms": b"1.5", b"chunks": f"[{','.join(one.to_json() for one in chunks)}]".encode(),
            b"vectors": np.zeros((len(names), 1), "<f4").tobytes(),
        }  # fmt: skip
        self.new.append(
            (f"{len(self.new)}-{len(self.pending) + len(self.acknowledged)}".encode(), fields)
        )

    def perform(self, step: Step) -> Any:
        match step:
            case Sleep(seconds):
                self.slept.append(seconds)
                self.now += seconds
                return None
            case RunScript(script, values):
                self.commands.append(script.name.rpartition("/")[2])
                answer = None
                if script is ACKNOWLEDGE:
                    self._acknowledge(values["ids"])
                if script is BEGIN:
                    answer = self._begin_reading()
            case Command(method, arguments):
                self.commands.append(method)
                answer = getattr(self, f"_{method}")(arguments)
        if (error := next(self.lost, None)) is not None:
            raise error
        return answer

    def _acknowledge(self, ids: list[bytes]) -> None:
        for one in ids:
            if self.pending.pop(one, None) is not None:
                self.acknowledged.append(one)

    def _begin_reading(self) -> int:
        self.has_group = self.exists
        return int(self.exists)

    def _xautoclaim(self, given: Any) -> Any:
        self.claimed_at.append(self.now)
        self._need_group()
        idle_s = given["min_idle_time"] / 1000
        found = [one for one, (_, at) in self.pending.items() if self.now - at >= idle_s]
        return [b"0-0", self._deliver([(one, self.pending[one][0]) for one in found[: given["count"]]])]

    def _xreadgroup(self, given: Any) -> Any:
        self._need_group()
        if given["streams"] != {keys.stream("s", "out"): ">"}:  # what the reader has
            return [
                [b"out", [(one, fields) for one, (fields, _) in self.pending.items()][: given["count"]]]
            ]
        found, self.new = self.new[: given["count"]], self.new[given["count"] :]
        if not found:
            self.now += given["block"] / 1000
            self.while_silent()
            return []
        return [[b"out", self._deliver(found)]]

    def _deliver(self, entries: list[tuple[bytes, Any]]) -> list[tuple[bytes, Any]]:
        self.pending |= {one: (fields, self.now) for one, fields in entries}
        return entries

    def _need_group(self) -> None:
        if not self.has_group:
            raise redis.ResponseError("NOGROUP No such key")


class Reader:
    """A reader of a fake output."""

    def __init__(self, output: FakeOutput, **given: Any) -> None:
        defaults: dict[str, Any] = {
            "timeout_s": 5.0, "remember": 1000, "claim_s": CLAIM_S, "auto_acknowledge": True,
            "options": OPTIONS,
        }  # fmt: skip
        self.core = ReaderCore("s", **{**defaults, "clock": output.clock, **given})
        self._output = output

    def next(self) -> StreamingResponse | StreamingError | None:
        return run(self.core.next_response(), self._output.perform)

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        self.core.begin()
        while (found := self.next()) is not None:
            yield found.chunk_ids


@laws(max_examples=50)
@given(
    responses=st.lists(st.text("abcdefgh", min_size=1, max_size=3), max_size=40),
    lost=st.lists(st.sampled_from([None, redis.ConnectionError(), redis.TimeoutError()]), max_size=12),
    remember=st.sampled_from([0, 1000]),
)
def test_every_chunk_is_given_once_and_everything_is_acknowledged_in_the_end(
    responses: list[str], lost: list[Any], remember: int
) -> None:
    output = FakeOutput(*responses)
    output.lost = iter(lost)
    reader = Reader(output, timeout_s=CLAIM_S / 2, remember=remember)
    given_ids = [name for ids in reader for name in ids]
    every = sorted({name for names in responses for name in names})
    assert sorted(set(given_ids)) == every
    if remember:
        assert sorted(given_ids) == every
    if not any(lost):
        seen = [name for names in responses for name in dict.fromkeys(names)]
        assert given_ids == (list(dict.fromkeys(seen)) if remember else seen)
    assert not output.pending
    assert len(output.acknowledged) == len(responses)


def test_a_response_is_handled_when_the_next_one_is_asked_for() -> None:
    output = FakeOutput("a", "b", "c")
    reader = Reader(output)
    assert (reader.next(), reader.next()) != (None, None)
    run(reader.core.leave(), output.perform)
    assert len(output.acknowledged) == 1
    assert output.commands[-1] == "requeue_responses"


def test_what_was_given_and_not_handled_comes_again_when_an_iteration_begins() -> None:
    output = FakeOutput("a", "b", "c")
    reader = Reader(output)
    for ids in reader:
        if ids == ("b",):
            break
    assert next(iter(reader)) == ("b",)
    assert list(reader) == [("b",), ("c",)]
    assert len(output.acknowledged) == 3


def test_a_caller_that_acknowledges_itself_gets_again_what_it_did_not_acknowledge() -> None:
    output = FakeOutput("a", "b", "a", "c", "d")
    reader = Reader(output, auto_acknowledge=False)
    batch = iter(reader)
    assert [next(batch), next(batch)] == [("a",), ("b",)]
    assert list(reader) == [("a",), ("b",), ("c",), ("d",)]
    reader.core.begin()
    assert reader.next() is not None
    reader.core.mark_handled()
    assert list(reader) == [("b",), ("c",), ("d",)]
    reader.core.mark_handled()
    assert list(reader) == []
    assert len(output.acknowledged) == 5


@pytest.mark.parametrize("error", [KeyboardInterrupt, redis.ConnectionError])
def test_responses_whose_answer_was_cut_off_come_at_once(error: type[BaseException]) -> None:
    output = FakeOutput("a", "b")
    output.has_group = True
    reader = Reader(output, timeout_s=CLAIM_S / 2)

    def cut(step: Step) -> Any:
        answer = output.perform(step)
        if isinstance(step, Command) and step.method == "xreadgroup":
            raise error
        return answer

    with pytest.raises(error):
        run(reader.core.next_response(), cut)
    output.now = 1000.0
    assert list(reader) == [("a",), ("b",)]
    assert not output.pending


def test_vectors_that_the_caller_changed_come_again_as_they_were() -> None:
    output = FakeOutput("a")
    reader = Reader(output)
    first = reader.next()
    assert isinstance(first, StreamingResponse)
    first.embeddings[:] = 7
    reader.core.begin()
    again = reader.next()
    assert isinstance(again, StreamingResponse)
    assert again.embeddings.tolist() == [[0.0]]


def test_a_response_of_repeated_chunks_only_is_acknowledged_unseen() -> None:
    output = FakeOutput("ab", "ab", "ba")
    assert list(Reader(output)) == [("a", "b")]
    assert len(output.acknowledged) == 3


def test_the_iteration_ends_when_the_stream_is_silent_and_not_when_its_reader_is_slow() -> None:
    output = FakeOutput(*(["a"] * (3 * FETCH)))
    seen = 0
    for _ in Reader(output, timeout_s=0.2, remember=0):
        seen += 1
        output.now += 10.0
    assert seen == 3 * FETCH
    began = output.now
    assert list(Reader(output, timeout_s=2.5)) == []
    assert output.now - began == pytest.approx(2.5)


def test_without_a_timeout_it_waits_for_ever() -> None:
    output = FakeOutput()
    output.while_silent = lambda: output.respond("a") if output.now > 1000.0 + 100 * BLOCK_S else None
    found = Reader(output, timeout_s=None).next()
    assert found is not None
    assert found.chunk_ids == ("a",)


def test_a_server_that_does_not_answer_is_asked_again_until_the_timeout() -> None:
    output = FakeOutput("a")
    output.lost = iter([redis.ConnectionError("lost")] * 1000)
    with pytest.raises(redis.ConnectionError):
        Reader(output, timeout_s=2.0).next()
    assert set(output.slept) == {REPEAT_S}
    assert 2.0 - REPEAT_S <= output.now - 1000.0 <= 2.0


def test_a_refusal_is_raised_at_once_and_a_missing_group_is_created() -> None:
    output = FakeOutput("a")
    assert list(Reader(output)) == [("a",)]
    assert output.commands[:2] == ["xautoclaim", "begin_reading"]
    for step in (Reader(output).next, lambda: run(acknowledging(output), output.perform)):
        output.lost = iter([redis.ResponseError("WRONGTYPE")])
        with pytest.raises(StreamFaultError, match="stream s: WRONGTYPE"):
            step()
    assert output.slept == []


def acknowledging(output: FakeOutput) -> Steps[None]:
    reader = Reader(output)
    output.respond("z")
    reader.next()
    reader.core.mark_handled()
    return reader.core.acknowledge()


@pytest.mark.parametrize("said", ["READONLY a replica", "MISCONF no disk", "LOADING", "OOM full"])
def test_a_state_of_the_server_is_waited_for(said: str) -> None:
    output = FakeOutput("a")
    output.lost = iter([redis.ResponseError(said)] * 3)  # what was done in spite of it is claimed
    assert list(Reader(output, timeout_s=CLAIM_S + 10)) == [("a",)]
    assert output.slept == [REPEAT_S] * 3


def test_a_stream_that_does_not_exist_is_looked_for_until_the_timeout() -> None:
    output = FakeOutput()
    output.exists = False
    assert list(Reader(output, timeout_s=2.0)) == []
    assert output.now - 1000.0 == pytest.approx(2.0)
    assert not output.has_group


@pytest.mark.parametrize(("claim_s", "every_s"), [(30.0, 1.0), (0.5, 0.25)])
def test_readers_that_fell_silent_are_looked_for_every_second_or_more_often(
    claim_s: float, every_s: float
) -> None:
    output = FakeOutput(*(["a"] * (20 * FETCH)))
    for _ in Reader(output, claim_s=claim_s, remember=0):
        output.now += every_s / FETCH / 2
    gaps = [after - before for before, after in pairwise(output.claimed_at[1:9])]
    assert len(gaps) > 5
    assert all(every_s * 0.999 <= gap < 2 * every_s for gap in gaps)


def test_a_reader_that_cannot_say_so_leaves_without_a_word() -> None:
    output = FakeOutput("a")
    reader = Reader(output)
    reader.next()
    for error in (redis.ConnectionError(), redis.ResponseError("WRONGTYPE"), OSError()):
        output.lost = iter([error])
        run(reader.core.leave(), output.perform)
