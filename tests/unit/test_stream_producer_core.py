"""A producer without a server: nothing is lost, doubled or out of order, and it rests as it is asked."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import redis
from hypothesis import given
from hypothesis import settings as laws
from hypothesis import strategies as st

from sutra_tasks import keys
from sutra_tasks.errors import (
    BackpressureSignal,
    BrokerNotConfiguredError,
    InvalidInputError,
    InvalidOptionError,
    InvalidTextError,
    StreamFaultError,
    UnconfirmedEntriesError,
)
from sutra_tasks.settings import Settings
from sutra_tasks.streaming.backpressure import ACTIONS, Level
from sutra_tasks.streaming.client import producer_core as module
from sutra_tasks.streaming.client.producer_core import ProducerCore, UnsentEntries
from sutra_tasks.streaming.client.steps import END, REPEAT_S, NextItem, RunScript, Sleep, Step, run
from sutra_tasks.streaming.entries import StreamEntry

CAPACITY = 10
OPTIONS = Settings(broker_url="redis://unused", stream_buffer_size=CAPACITY)


class FakeStream:
    """Takes the steps of producers as a server would; time passes only when somebody sleeps or works."""

    def __init__(self, *, capacity: int = CAPACITY, level: Level = Level.NORMAL) -> None:
        self.now, self.answer_s, self.slept = 1000.0, 0.0, list[float]()
        self.capacity, self.level, self.per_s = capacity, level, 0.0
        self.waiting, self.taken = list[str](), list[str]()
        self.batches: list[int] = []
        self.lost: Iterator[Exception | None] = iter(())
        self.while_sleeping: Callable[[], object] = lambda: None
        self._last: dict[str, tuple[int, int]] = {}

    def clock(self) -> float:
        return self.now

    def take(self, count: int) -> None:
        """Take entries out, as a device would."""
        self.taken += self.waiting[:count]
        del self.waiting[:count]

    @property
    def accepted(self) -> list[str]:
        return self.taken + self.waiting

    def perform(self, step: Step) -> Any:
        match step:
            case NextItem(source):
                return next(source, END)
            case Sleep(seconds):
                assert seconds >= 0
                self.slept.append(seconds)
                self.now += seconds
                return self.while_sleeping()
            case RunScript(_, values):
                self.now += self.answer_s
                answer = self._add(values)
                if (error := next(self.lost, None)) is not None:
                    raise error
                return answer
        raise AssertionError(step)

    def _add(self, values: Any) -> list[Any]:
        self.batches.append(values["batch"])
        number, added = self._last.get(values["last_batch"], (0, 0))
        if number != values["batch"]:
            fields = iter(values["fields"])
            texts = [
                dict(zip(*[iter([next(fields) for _ in range(count)])] * 2, strict=True))["text"]
                for count in values["field_counts"]
            ]
            added = max(0, min(len(texts), self.capacity - len(self.waiting)))
            self.waiting += texts[:added]
            self._last[values["last_batch"]] = values["batch"], added
        rate = ACTIONS[self.level].throttle_rate
        return [added, len(self.waiting), self.capacity, str(rate).encode(), str(self.per_s).encode()]


class Producer:
    """A producer of a fake stream."""

    def __init__(self, stream: FakeStream, **given: Any) -> None:
        defaults = {"wait": True, "batch": 64, "timeout_s": None, "options": OPTIONS}
        self.core = ProducerCore("s", **{**defaults, "clock": stream.clock, **given})
        self._stream = stream

    def send(self, text: str | StreamEntry = "x") -> str:
        return run(self.core.send(text, {}), self._stream.perform)

    def send_many(self, entries: Any) -> int:
        return run(self.core.send_many(iter(entries)), self._stream.perform)

    def offer(self, entries: Any) -> Iterator[BackpressureSignal]:
        unsent = UnsentEntries(iter(entries))
        while signal := run(self.core.add_until_refused(unsent), self._stream.perform):
            yield signal


def named(*numbers: int) -> list[str]:
    return [f"t{number}" for number in numbers]


def test_errors_of_entries_count_all_entries_of_the_call() -> None:
    with pytest.raises(InvalidTextError) as told:
        Producer(FakeStream(capacity=500), batch=64).send_many([*named(*range(100)), None])
    assert told.value.position == 100


# Nothing is lost, doubled or out of order.


@laws(max_examples=50)
@given(
    count=st.integers(0, 40),
    batch=st.integers(1, 12),
    capacity=st.integers(1, 12),
    taken=st.integers(1, 12),
    lost=st.lists(st.sampled_from([None, redis.ConnectionError(), OSError()]), max_size=20),
    invalid_at=st.none() | st.integers(0, 40),
    offers=st.booleans(),
)
def test_every_entry_before_a_failure_is_accepted_once_and_in_order(
    *,
    count: int,
    batch: int,
    capacity: int,
    taken: int,
    lost: list[Any],
    invalid_at: int | None,
    offers: bool,
) -> None:
    stream = FakeStream(capacity=capacity)
    stream.lost = iter(lost)
    stream.while_sleeping = lambda: stream.take(taken)
    entries: list[Any] = named(*range(count))
    if invalid_at is not None:
        entries.insert(invalid_at, 5)
    expected = named(*range(count if invalid_at is None else min(count, invalid_at)))
    producer = Producer(stream, batch=batch, timeout_s=1e6)

    def act() -> None:
        if offers:
            for signal in producer.offer(entries):
                assert signal.capacity == capacity
                assert signal.accepted == len(stream.accepted)
                stream.take(taken)
        else:
            assert producer.send_many(entries) == count

    if invalid_at is None:
        act()
    else:
        with pytest.raises(InvalidInputError):
            act()
    assert stream.accepted == expected
    assert stream.batches == sorted(stream.batches)


def test_a_batch_whose_answer_was_lost_is_sent_again_as_the_same_batch() -> None:
    stream = FakeStream()
    stream.lost = iter([redis.ConnectionError("lost")] * 3)
    assert Producer(stream, batch=4).send_many(named(*range(6))) == 6
    assert stream.accepted == named(*range(6))
    assert stream.batches == [1, 1, 1, 1, 2]
    assert stream.slept == [REPEAT_S] * 3


def test_a_server_that_never_answers_leaves_it_open_whether_it_has_them() -> None:
    stream = FakeStream()
    stream.lost = iter([redis.ConnectionError("lost")] * 1000)
    with pytest.raises(UnconfirmedEntriesError) as told:
        Producer(stream, timeout_s=2.0).send_many([StreamEntry("a", id="1"), StreamEntry("b", id="2")])
    assert told.value.ids == ["1", "2"]
    assert told.value.reason == "lost"
    assert 2.0 <= stream.now - 1000 <= 2.0 + REPEAT_S
    assert set(stream.batches) == {1}


def test_a_refusal_of_the_server_is_raised_at_once() -> None:
    stream = FakeStream()
    stream.lost = iter([redis.ResponseError("WRONGTYPE")])
    with pytest.raises(StreamFaultError, match="WRONGTYPE"):
        Producer(stream).send()
    assert stream.slept == []


def test_a_state_of_the_server_is_waited_for() -> None:
    stream = FakeStream()
    stream.lost = iter([redis.ResponseError("MISCONF no disk"), redis.BusyLoadingError(), None])
    Producer(stream).send()
    assert stream.slept == [REPEAT_S] * 2


def test_long_texts_are_sent_in_smaller_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_CHARS", 10)
    stream = FakeStream()
    producer = Producer(stream)
    assert producer.send_many(["x" * 6] * 5) == 5
    assert stream.batches == [1, 2, 3]
    assert producer.send_many([]) == 0
    assert stream.batches == [1, 2, 3]


def test_an_iterable_is_read_batch_by_batch() -> None:
    stream, read = FakeStream(capacity=4), list[int]()

    def texts() -> Iterator[str]:
        for number in range(20):
            read.append(number)
            yield f"t{number}"

    signals = Producer(stream, batch=3).offer(texts())
    next(signals)
    assert read == list(range(6))


def test_what_cannot_be_is_refused_when_a_producer_is_made() -> None:
    for given_, named_ in (({"batch": 0}, "batch"), ({"options": Settings()}, None)):
        with pytest.raises(InvalidOptionError if named_ else BrokerNotConfiguredError, match=named_):
            Producer(FakeStream(), **given_)
    with pytest.raises(InvalidOptionError, match="stream"):
        ProducerCore(
            "a b", wait=True, batch=1, timeout_s=None, options=OPTIONS, clock=FakeStream().clock
        )


# Streams that take no more for now.


def test_a_refused_producer_waits_for_a_tenth_of_the_capacity() -> None:
    stream = FakeStream()
    stream.per_s = 5.0
    stream.while_sleeping = lambda: stream.take(4)
    assert Producer(stream, batch=8).send_many(named(*range(30))) == 30
    assert stream.accepted == named(*range(30))
    assert set(stream.slept) == {module.FREE_SHARE * CAPACITY / 5.0}


@pytest.mark.parametrize("per_s", [0.0, 1e-3, 1.0, 1e6])
def test_a_wait_for_room_is_neither_a_blink_nor_longer_than_a_second(per_s: float) -> None:
    stream = FakeStream()
    stream.per_s = per_s
    (signal,) = [next(Producer(stream).offer(named(*range(20))))]
    assert module.RETRY_AFTER_S[0] <= signal.retry_after_s <= module.RETRY_AFTER_S[1]


def test_a_producer_does_not_wait_for_longer_than_it_was_told_to() -> None:
    stream = FakeStream()
    producer = Producer(stream, timeout_s=3.1)
    producer.send_many(named(*range(CAPACITY)))
    with pytest.raises(BackpressureSignal):
        producer.send()
    assert sum(stream.slept) == pytest.approx(3.1)
    assert stream.accepted == named(*range(CAPACITY))


def test_each_batch_may_wait_as_long_as_the_producer_may() -> None:
    stream = FakeStream(capacity=2)
    stream.while_sleeping = lambda: stream.take(2) if len(stream.slept) % 11 == 0 else None
    assert Producer(stream, batch=2, timeout_s=3.0).send_many(named(*range(10))) == 10
    assert stream.slept == [REPEAT_S] * 44  # 2.75 s for each but the first


def test_one_that_does_not_wait_is_told_at_once() -> None:
    stream = FakeStream()
    with pytest.raises(BackpressureSignal) as told:
        Producer(stream, wait=False).send_many(named(*range(25)))
    assert (told.value.size, told.value.capacity, told.value.accepted) == (CAPACITY,) * 3
    assert stream.slept == []


# How fast they go.


def work(stream: FakeStream, producers: Sequence[Producer], count: int, seconds: float) -> None:
    """Come up with texts, one after the other, and send each to all."""
    for _ in range(count):
        stream.now += seconds
        for producer in producers:
            producer.send()


@pytest.fixture(autouse=True)
def _own_time() -> Iterator[None]:
    """Each test begins as if no producer had been used on its thread."""
    before = module._time_in_producers.set(module._TimeInProducers())
    yield
    module._time_in_producers.reset(before)


@pytest.mark.parametrize("level", list(Level))
@pytest.mark.parametrize("streams", [1, 3])
def test_a_producer_offers_the_share_of_its_own_rate_that_it_is_asked_for(
    level: Level, streams: int
) -> None:
    share = {Level.NORMAL: 1.0, Level.MODERATE: 0.8, Level.SEVERE: 0.5}[level]
    stream = FakeStream(capacity=1000, level=level)
    producers = [Producer(stream) for _ in range(streams)]
    work(stream, producers, 1, 0.0)  # they hear of it
    assert {producer.core.throttle_rate for producer in producers} == {share}
    began = stream.now
    work(stream, producers, 20, 0.1)
    assert stream.now - began == pytest.approx(2.0 / share)  # for each of the streams


def test_time_at_the_server_is_no_work() -> None:
    stream = FakeStream(capacity=1000, level=Level.SEVERE)
    stream.answer_s = 7.0
    producers = [Producer(stream), Producer(stream)]
    work(stream, producers, 1, 0.0)
    work(stream, producers, 5, 0.25)
    assert stream.slept == [0.25] * 5


def test_a_refused_caller_has_rested() -> None:
    stream = FakeStream(level=Level.SEVERE)
    signals = Producer(stream, batch=CAPACITY).offer(named(*range(2 * CAPACITY)))
    next(signals)
    stream.now += 100
    stream.take(CAPACITY)
    assert list(signals) == []
    assert sum(stream.slept) == 0


def test_to_wait_for_one_stream_is_no_work_for_another() -> None:
    stream, other = FakeStream(level=Level.SEVERE), FakeStream(level=Level.SEVERE)
    producer = Producer(stream, timeout_s=5.0, batch=CAPACITY)
    second = Producer(other, clock=stream.clock)
    second.core.throttle_rate = 0.5
    with pytest.raises(BackpressureSignal):
        producer.send_many(named(*range(CAPACITY + 1)))
    assert sum(stream.slept) == pytest.approx(5.0)
    second.send()
    assert other.slept == []


def test_work_for_several_streams_by_turns_is_rested_for_once() -> None:
    stream = FakeStream(capacity=1000, level=Level.SEVERE)
    producers = [Producer(stream) for _ in range(3)]
    work(stream, producers, 1, 0.0)
    began = stream.now
    for _ in range(20):
        for each in producers:
            work(stream, [each], 1, 0.1)
    assert stream.now - began == pytest.approx(6.0 / 0.5, rel=0.05)


def test_rests_are_for_work_since_the_producer_was_made_whatever_thread_uses_it() -> None:
    stream = FakeStream(capacity=1000, level=Level.SEVERE)
    mine = Producer(stream)
    mine.send()
    stream.now += 50.0
    mine.send()
    stream.slept.clear()
    handed = Producer(stream)
    handed.send()
    stream.now += 1.0
    thread = threading.Thread(target=handed.send)
    thread.start()
    thread.join()
    assert stream.slept == [pytest.approx(1.0)]


def test_an_idle_hour_is_no_work() -> None:
    stream = FakeStream(capacity=1000, level=Level.SEVERE)
    producer = Producer(stream)
    producer.send()
    stream.now += 3600
    producer.send()
    assert sum(stream.slept) <= keys.STATE_S
