"""Producers on a real server: what is accepted is in the stream, once, in order, never too much."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest
import redis

from sutra_tasks import keys
from sutra_tasks.errors import (
    BackpressureSignal,
    BrokerNotConfiguredError,
    InvalidInputError,
    InvalidOptionError,
    UnconfirmedEntriesError,
)
from sutra_tasks.host.embedded_server import free_port
from sutra_tasks.settings import Settings
from sutra_tasks.streaming import producer as module
from sutra_tasks.streaming.backpressure import Level
from sutra_tasks.streaming.entries import LOW_PRIORITY, StreamEntry
from sutra_tasks.streaming.producer import AsyncStreamProducer, StreamProducer
from sutra_tasks.streaming.upkeep_store import StreamState, UpkeepStore
from tests.conftest import wait_until
from tests.redis.peers import full_memory

S = "s"
IN, CLOSED, TOTALS = (keys.stream(S, part) for part in ("in", "closed", "totals"))
CAPACITY = 10


@pytest.fixture(autouse=True)
def _swept(_nothing_is_left_behind: None, client: redis.Redis) -> Iterator[None]:
    """Only what was sent lasts, and that there is a stream."""
    yield
    client.delete(IN, CLOSED, keys.STREAMS)


class Time:
    """A clock that goes on only when somebody sleeps or works."""

    def __init__(self) -> None:
        self.now, self.slept = 1000.0, list[float]()

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.slept.append(seconds)
        self.now += seconds

    async def async_sleep(self, seconds: float) -> None:
        self.sleep(seconds)


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Time:
    """Time as this test's producers see it."""
    found = Time()
    monkeypatch.setattr(module, "_AWAY_S", type(module._AWAY_S)("away_s", default=(0.0, 0.0)))
    return found


@pytest.fixture
def options(url: str) -> Settings:
    return Settings(broker_url=url, stream_buffer_size=CAPACITY)


@pytest.fixture
def open_producer(options: Settings, at: Time) -> Iterator[Callable[..., StreamProducer]]:
    """``open_producer(...)``: a producer that sleeps in this test's time."""
    opened: list[StreamProducer] = []

    def open_one(**given: Any) -> StreamProducer:
        found = StreamProducer(S, **{"options": options, "clock": at, "sleep": at.sleep, **given})
        opened.append(found)
        return found

    yield open_one
    for one in opened:
        one.close()


def waiting(client: redis.Redis, name: str = IN) -> list[str]:
    """Return the texts in the stream, in order."""
    found: Any = client.xrange(name)
    return [fields[b"text"].decode() for _, fields in found]


def take(client: redis.Redis, count: int) -> list[str]:
    """Take texts out as a device would."""
    found: Any = client.xrange(IN, count=count)
    client.xdel(IN, *(entry_id for entry_id, _ in found))
    return [fields[b"text"].decode() for _, fields in found]


def named(*numbers: int) -> list[str]:
    return [f"t{number}" for number in numbers]


def publish(client: redis.Redis, level: Level, capacity: int = CAPACITY, per_s: float = 0.0) -> None:
    """Say what devices would."""
    UpkeepStore(client, "x").publish_backpressure(
        S, level, level, capacity=capacity, load=0.0, per_s=per_s
    )


def totals(client: redis.Redis) -> dict[str, int]:
    found: Any = client.hgetall(TOTALS)
    return {name.decode(): int(value) for name, value in found.items()}


# What a stream takes.


def test_texts_come_in_the_order_they_were_sent_with_all_their_fields(
    client: redis.Redis, open_producer: Callable[..., StreamProducer]
) -> None:
    producer = open_producer(batch=3)
    assert producer.send("grün\x00", id="i", key="k", end=True, seq=0, priority=3, prompt="p") == "i"
    assert producer.send_many([*named(1, 2, 3), StreamEntry("t4"), "t5"]) == 5
    found: Any = client.xrange(IN)
    assert {name.decode(): value.decode() for name, value in found[0][1].items()} == {
        "text": "grün\x00", "id": "i", "key": "k", "end": "1", "seq": "0", "priority": "3", "prompt": "p"
    }  # fmt: skip
    assert waiting(client)[1:] == named(1, 2, 3, 4, 5)
    ids = [fields[b"id"] for _, fields in found]
    assert len(set(ids)) == 6
    assert client.smembers(keys.STREAMS) == {S.encode()}
    assert totals(client) == {"accepted": 6}
    assert client.ttl(TOTALS) > 0


def test_an_id_is_made_for_a_text_without_one_and_is_told(
    client: redis.Redis, open_producer: Callable[..., StreamProducer]
) -> None:
    producer, other = open_producer(), open_producer()
    told = [producer.send("a"), producer.send(StreamEntry("b")), other.send("c")]
    found: Any = client.xrange(IN)
    assert [fields[b"id"].decode() for _, fields in found] == told
    assert len(set(told)) == 3


def test_a_stream_never_holds_more_than_its_capacity(
    client: redis.Redis, open_producer: Callable[..., StreamProducer]
) -> None:
    producer = open_producer(wait=False)
    with pytest.raises(BackpressureSignal) as told:
        producer.send_many(named(*range(25)))
    assert waiting(client) == named(*range(CAPACITY))
    assert (told.value.size, told.value.capacity, told.value.throttle_rate) == (CAPACITY, CAPACITY, 1.0)
    assert module.RETRY_S[0] <= told.value.retry_after_s <= module.RETRY_S[1]
    assert "is full" in str(told.value)
    assert told.value.accepted == CAPACITY
    assert totals(client) == {"accepted": CAPACITY, "refused": 1}


def test_many_producers_together_never_exceed_it_and_each_keeps_its_order(
    client: redis.Redis, options: Settings
) -> None:
    most, done, got = [0], threading.Event(), list[str]()
    publish(client, Level.NORMAL, per_s=1000.0)  # there is room soon

    def produce(name: int) -> None:
        with StreamProducer(S, batch=7, timeout_s=60, options=options) as producer:
            producer.send_many(f"{name} {number}" for number in range(100))

    def consume() -> None:
        while not done.is_set() or client.xlen(IN):
            size: Any = client.xlen(IN)
            most[0] = max(most[0], size)
            if size:
                got.extend(take(client, 3))

    threads = [threading.Thread(target=produce, args=[name]) for name in range(4)]
    consumer = threading.Thread(target=consume)
    for thread in [*threads, consumer]:
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    consumer.join()
    assert 0 < most[0] <= CAPACITY
    for name in range(4):
        mine = [text for text in got if text.startswith(f"{name} ")]
        assert mine == [f"{name} {number}" for number in range(100)]


def test_the_capacity_is_what_devices_say_and_the_producers_own_if_they_say_nothing(
    client: redis.Redis, open_producer: Callable[..., StreamProducer]
) -> None:
    producer = open_producer(wait=False)
    publish(client, Level.NORMAL, capacity=3)
    with pytest.raises(BackpressureSignal) as told:
        producer.send_many(named(*range(20)))
    assert (client.xlen(IN), told.value.capacity) == (3, 3)
    client.delete(keys.stream(S, "state"))
    with pytest.raises(BackpressureSignal) as told:
        producer.send_many(named(*range(20)))
    assert (client.xlen(IN), told.value.capacity) == (CAPACITY, CAPACITY)


def test_a_stream_over_its_capacity_takes_nothing(
    client: redis.Redis, open_producer: Callable[..., StreamProducer]
) -> None:
    for number in range(CAPACITY + 5):
        client.xadd(IN, {"text": number})
    with pytest.raises(BackpressureSignal) as told:
        open_producer(wait=False).send("x")
    assert (told.value.size, client.xlen(IN)) == (CAPACITY + 5, CAPACITY + 5)


def test_what_can_wait_is_shed_under_pressure_and_its_producer_is_told(
    client: redis.Redis, open_producer: Callable[..., StreamProducer]
) -> None:
    producer = open_producer(wait=False)
    publish(client, Level.MODERATE)
    producer.send("taken", priority=9)
    publish(client, Level.SEVERE)
    for priority in range(10):
        if priority < LOW_PRIORITY:
            producer.send("taken", priority=priority)
        else:
            with pytest.raises(BackpressureSignal, match="sheds entries of low priority") as told:
                producer.send("shed", priority=priority)
            assert told.value.throttle_rate == 0.5
    assert waiting(client) == ["taken"] * 7
    assert totals(client) == {"accepted": 7, "shed": 4}


def test_what_follows_a_shed_entry_keeps_its_place(
    client: redis.Redis, open_producer: Callable[..., StreamProducer]
) -> None:
    publish(client, Level.SEVERE)
    entries = [StreamEntry(text, priority=p) for text, p in (("a", 0), ("b", 6), ("c", 0))]
    signals = open_producer().offer(entries)
    next(signals)
    assert waiting(client) == ["a"]
    publish(client, Level.NORMAL)
    assert list(signals) == []
    assert waiting(client) == ["a", "b", "c"]


def test_a_closed_stream_takes_nothing(
    client: redis.Redis, open_producer: Callable[..., StreamProducer]
) -> None:
    for number in range(2):
        client.xadd(IN, {"text": number})
    server = UpkeepStore(client, "x")
    server.enforce_hard_limit(S, StreamState(2, False, 0, Level.NORMAL, {}), 1)
    with pytest.raises(BackpressureSignal) as told:
        open_producer(wait=False).send("x")
    assert told.value.size == 2
    assert client.xlen(CLOSED) == 2
    server.enforce_hard_limit(S, StreamState(2, True, 0, Level.NORMAL, {}), 4)
    open_producer(wait=False).send("x")
    assert waiting(client) == ["0", "1", "x"]


# Answers that are lost.


@pytest.mark.parametrize("room", [0, 2, 5])
def test_a_batch_that_is_sent_again_adds_nothing_and_is_answered_the_same(
    client: redis.Redis, open_producer: Callable[..., StreamProducer], room: int
) -> None:
    publish(client, Level.NORMAL, capacity=room or 1)
    producer = open_producer()
    if not room:
        producer.send("full")
    names, arguments = producer._request([StreamEntry(text) for text in named(*range(4))])
    first: Any = producer._add(keys=names, args=arguments)
    take(client, 9)
    again: Any = producer._add(keys=names, args=arguments)
    assert first[0] == again[0] == min(4, room)
    assert client.xlen(IN) == 0
    assert producer.send("next")
    assert waiting(client) == ["next"]


def test_producers_do_not_take_each_others_batches_for_their_own(
    client: redis.Redis, open_producer: Callable[..., StreamProducer]
) -> None:
    for _ in range(2):
        for number in range(2):
            open_producer().send(f"{number}")
    assert waiting(client) == ["0", "1", "0", "1"]


class Losing:
    """A script whose answers are lost, or that never runs, so often."""

    def __init__(self, script: Any, *, lost: int, runs: bool = True, what: Any = None) -> None:
        self.script, self.lost, self.runs = script, lost, runs
        self.what, self.numbers = what or redis.ConnectionError("lost"), list[int]()

    def __call__(self, keys: Sequence[str], args: Sequence[Any]) -> Any:
        self.numbers.append(args[1])
        answer = self.script(keys=keys, args=args) if self.runs or not self.lost else None
        if not self.lost:
            return answer
        self.lost -= 1
        raise self.what


@pytest.mark.parametrize(
    "what", [redis.ConnectionError(), redis.TimeoutError(), redis.OutOfMemoryError(), OSError()]
)
def test_a_batch_whose_answer_was_lost_is_in_the_stream_once(
    client: redis.Redis, open_producer: Callable[..., StreamProducer], at: Time, what: Exception
) -> None:
    producer = open_producer(batch=4)
    losing: Any = Losing(producer._add, lost=3, what=what)
    producer._add = losing
    assert producer.send_many(named(*range(6))) == 6
    assert waiting(client) == named(*range(6))
    assert losing.numbers == [1, 1, 1, 1, 2]
    assert at.slept == [module.AGAIN_S] * 3


def test_a_server_that_never_answers_leaves_it_open_whether_it_has_them(
    client: redis.Redis, open_producer: Callable[..., StreamProducer], at: Time
) -> None:
    producer = open_producer(timeout_s=2.0)
    losing: Any = Losing(producer._add, lost=10**6)
    producer._add = losing
    with pytest.raises(UnconfirmedEntriesError) as told:
        producer.send_many(named(1, 2))
    entries: Any = client.xrange(keys.stream(S, "in"))
    assert told.value.ids == [fields[b"id"].decode() for _, fields in entries]
    assert told.value.reason == "lost"
    assert 2.0 <= at.now - 1000 <= 2.0 + module.AGAIN_S
    assert waiting(client) == named(1, 2)
    assert set(losing.numbers) == {1}


def test_a_server_that_is_not_there_is_an_error_after_a_while() -> None:
    away = Settings(broker_url=f"redis://127.0.0.1:{free_port()}/0")
    with (
        StreamProducer(S, timeout_s=0, options=away) as producer,
        pytest.raises(UnconfirmedEntriesError),
    ):
        producer.send("x")


def test_a_full_server_is_waited_for(
    client: redis.Redis, open_producer: Callable[..., StreamProducer], at: Time
) -> None:
    with full_memory(client):

        def sleep(seconds: float) -> None:
            at.sleep(seconds)
            if len(at.slept) == 3:
                client.config_set("maxmemory", "0")

        open_producer(sleep=sleep).send("x")
    assert waiting(client) == ["x"]
    assert at.slept == [module.AGAIN_S] * 3


# Streams that take no more for now.


def test_a_producer_that_waits_sends_all_when_there_is_room(
    client: redis.Redis, open_producer: Callable[..., StreamProducer], at: Time
) -> None:
    got: list[str] = []

    def sleep(seconds: float) -> None:
        at.sleep(seconds)
        got.extend(take(client, 4))

    publish(client, Level.NORMAL, per_s=5.0)
    producer = open_producer(sleep=sleep, batch=8)
    assert producer.send_many(named(*range(30))) == 30
    assert got + waiting(client) == named(*range(30))
    assert set(at.slept) == {module.ROOM_SHARE * CAPACITY / 5.0}
    assert totals(client)["accepted"] == 30


def test_a_producer_does_not_wait_for_longer_than_it_was_told_to(
    client: redis.Redis, open_producer: Callable[..., StreamProducer], at: Time
) -> None:
    producer = open_producer(timeout_s=3.1)
    producer.send_many(named(*range(CAPACITY)))
    with pytest.raises(BackpressureSignal):
        producer.send("x")
    assert sum(at.slept) == pytest.approx(3.1)
    assert waiting(client) == named(*range(CAPACITY))


def test_one_that_offers_is_told_and_then_has_sent_everything_once(
    client: redis.Redis, open_producer: Callable[..., StreamProducer], at: Time
) -> None:
    got, signals = [], 0
    for signal in open_producer(batch=4).offer(named(*range(30))):
        assert (signal.size, signal.capacity) == (CAPACITY, CAPACITY)
        assert client.xlen(IN) == CAPACITY
        signals += 1
        if signals % 2:  # a consumer that has not come to it yet
            got += take(client, 3)
    assert got + waiting(client) == named(*range(30))
    assert signals == 13
    assert at.slept == []


def test_what_is_before_a_text_that_cannot_be_embedded_is_in_the_stream(
    client: redis.Redis, options: Settings, open_producer: Callable[..., StreamProducer]
) -> None:
    bad: Any = 5
    for method in ("send_many", "offer"):
        given = iter([*named(1, 2, 3), bad, "t4"])
        with pytest.raises(InvalidInputError):
            list([getattr(open_producer(batch=2), method)(given)][0])
        assert waiting(client) == named(1, 2, 3)
        assert list(given) == ["t4"]
        client.delete(IN)
    with pytest.raises(InvalidInputError):
        open_producer().send_many([bad])
    with pytest.raises(InvalidInputError):
        open_producer().send("x", end=True)
    assert client.exists(IN) == 0


def test_what_was_given_before_the_callers_own_error_is_in_the_stream(
    client: redis.Redis, open_producer: Callable[..., StreamProducer], run: Callable[..., Any]
) -> None:
    def failing() -> Iterator[str]:
        yield from named(1, 2, 3)
        raise LookupError

    async def act(producer: AsyncStreamProducer) -> None:
        async def failing_later() -> AsyncIterator[str]:
            for text in failing():
                yield text

        for given in (failing(), failing_later()):
            with pytest.raises(LookupError):
                await producer.send_many(given)

    with pytest.raises(LookupError):
        open_producer(batch=2).send_many(failing())
    assert waiting(client) == named(1, 2, 3)
    run(act, batch=2)
    assert waiting(client) == named(1, 2, 3) * 3


def test_long_texts_go_in_smaller_batches(
    client: redis.Redis,
    open_producer: Callable[..., StreamProducer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "BATCH_CHARS", 10)
    producer = open_producer()
    losing: Any = Losing(producer._add, lost=0)
    producer._add = losing
    assert producer.send_many(["x" * 6] * 5) == 5
    assert losing.numbers == [1, 2, 3]
    assert producer.send_many([]) == 0


def test_what_cannot_be_is_refused_when_a_producer_is_made(options: Settings) -> None:
    with pytest.raises(InvalidOptionError, match="batch"):
        StreamProducer(S, batch=0, options=options)
    with pytest.raises(InvalidOptionError, match="stream"):
        StreamProducer("a b", options=options)
    with pytest.raises(BrokerNotConfiguredError):
        StreamProducer(S, options=Settings())


# How fast they go.


def work(at: Time, producers: Sequence[StreamProducer], count: int, seconds: float) -> None:
    """Come up with texts, one after the other, and send each to all."""
    for _ in range(count):
        at.now += seconds
        for producer in producers:
            producer.send("x")


@pytest.mark.parametrize("level", list(Level))
@pytest.mark.parametrize("streams", [1, 3])
def test_a_producer_offers_the_share_of_its_own_rate_that_it_is_asked_for(
    client: redis.Redis,
    open_producer: Callable[..., StreamProducer],
    at: Time,
    level: Level,
    streams: int,
) -> None:
    share = {Level.NORMAL: 1.0, Level.MODERATE: 0.8, Level.SEVERE: 0.5}[level]
    publish(client, level, capacity=1000)
    producers = [open_producer() for _ in range(streams)]
    work(at, producers, 1, 0.0)  # they hear of it
    assert {producer.throttle_rate for producer in producers} == {share}
    began = at.now
    work(at, producers, 20, 0.1)
    assert at.now - began == pytest.approx(2.0 / share)  # for each of the streams


def test_time_at_the_server_is_no_work(
    client: redis.Redis, open_producer: Callable[..., StreamProducer], at: Time
) -> None:
    publish(client, Level.SEVERE, capacity=1000)
    producer, other = open_producer(), open_producer()
    for each in (producer, other):
        script = each._add

        def slow(keys: Any, args: Any, script: Any = script) -> Any:
            at.now += 7.0
            return script(keys=keys, args=args)

        each._add = slow  # type: ignore[assignment]
    work(at, [producer, other], 1, 0.0)
    work(at, [producer, other], 5, 0.25)
    assert at.slept == [0.25] * 5


def test_who_was_refused_has_rested(
    client: redis.Redis, open_producer: Callable[..., StreamProducer], at: Time
) -> None:
    publish(client, Level.SEVERE)
    signals = open_producer(batch=CAPACITY).offer(named(*range(2 * CAPACITY)))
    next(signals)
    at.now += 100
    take(client, CAPACITY)
    assert list(signals) == []
    assert sum(at.slept) == 0


def test_to_wait_for_room_in_one_stream_is_no_work_for_another(
    client: redis.Redis, open_producer: Callable[..., StreamProducer], options: Settings, at: Time
) -> None:
    publish(client, Level.SEVERE)
    producer = open_producer(timeout_s=5.0, batch=CAPACITY)
    with StreamProducer("other", options=options, clock=at, sleep=at.sleep) as other:
        other._throttle_rate = 0.5
        with pytest.raises(BackpressureSignal):
            producer.send_many(named(*range(CAPACITY + 1)))
        assert sum(at.slept) == pytest.approx(5.0)
        other.send("x")
    assert sum(at.slept) == pytest.approx(5.0)
    client.delete(keys.stream("other", "in"))


def test_work_for_several_streams_by_turns_is_rested_for_once(
    client: redis.Redis, open_producer: Callable[..., StreamProducer], at: Time
) -> None:
    publish(client, Level.SEVERE, capacity=1000)
    producers = [open_producer() for _ in range(3)]
    work(at, producers, 1, 0.0)
    began = at.now
    for _ in range(20):
        for each in producers:
            work(at, [each], 1, 0.1)
    assert at.now - began == pytest.approx(6.0 / 0.5, rel=0.05)


def test_rests_are_for_work_since_the_producer_was_made_whatever_thread_uses_it(
    client: redis.Redis, open_producer: Callable[..., StreamProducer], at: Time
) -> None:
    publish(client, Level.SEVERE, capacity=1000)
    mine = open_producer()
    mine.send("x")
    at.now += 50.0
    mine.send("x")
    at.slept.clear()
    handed = open_producer()
    handed.send("x")
    at.now += 1.0
    thread = threading.Thread(target=handed.send, args=["x"])
    thread.start()
    thread.join()
    assert at.slept == [pytest.approx(1.0)]


# In an event loop.


@pytest.fixture
def run(options: Settings, at: Time, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``run(act, ...)``: ``await act(producer)`` with an asynchronous producer in this test's time."""
    monkeypatch.setattr("time.monotonic", at)
    monkeypatch.setattr("asyncio.sleep", at.async_sleep)

    def run_one(act: Callable[[AsyncStreamProducer], Any], **given: Any) -> Any:
        async def main() -> Any:
            async with AsyncStreamProducer(S, **{"options": options, **given}) as producer:
                return await act(producer)

        return asyncio.run(main())

    return run_one


async def arriving(texts: Iterable[Any]) -> AsyncIterator[Any]:
    for text in texts:
        yield text


@pytest.mark.parametrize("source", [list, arriving])
def test_an_asynchronous_one_sends_in_order_and_never_too_much(
    client: redis.Redis, run: Callable[..., Any], source: Callable[..., Any]
) -> None:
    async def act(producer: AsyncStreamProducer) -> None:
        assert await producer.send("t0", id="i", priority=2) == "i"
        assert await producer.send_many(source(named(1, 2, 3))) == 3
        with pytest.raises(BackpressureSignal) as told:
            await producer.send_many(source(named(*range(4, 20))))
        assert (told.value.size, told.value.capacity) == (CAPACITY, CAPACITY)

    run(act, wait=False, batch=2)
    assert waiting(client) == named(*range(CAPACITY))
    assert totals(client) == {"accepted": CAPACITY, "refused": 1}


@pytest.mark.parametrize("source", [list, arriving])
def test_an_asynchronous_one_offers_until_all_is_sent(
    client: redis.Redis, run: Callable[..., Any], source: Callable[..., Any]
) -> None:
    async def act(producer: AsyncStreamProducer) -> list[str]:
        got: list[str] = []
        async for signal in producer.offer(source(named(*range(30)))):
            assert signal.size == CAPACITY
            got += take(client, 3)
        return got

    got = run(act, batch=4)
    assert got + waiting(client) == named(*range(30))


def test_an_asynchronous_one_waits_and_gives_up(
    client: redis.Redis, run: Callable[..., Any], at: Time
) -> None:
    async def act(producer: AsyncStreamProducer) -> None:
        await producer.send_many(named(*range(CAPACITY)))
        with pytest.raises(BackpressureSignal):
            await producer.send("x")

    run(act, timeout_s=3.1)
    assert sum(at.slept) == pytest.approx(3.1)


@pytest.mark.parametrize("source", [list, arriving])
def test_an_asynchronous_one_sends_what_is_before_an_invalid_text(
    client: redis.Redis, run: Callable[..., Any], source: Callable[..., Any]
) -> None:
    async def act(producer: AsyncStreamProducer) -> None:
        with pytest.raises(InvalidInputError):
            await producer.send_many(source([*named(1, 2, 3), 5, "t4"]))

    run(act, batch=2)
    assert waiting(client) == named(1, 2, 3)


def test_an_asynchronous_ones_lost_answers_add_nothing(
    client: redis.Redis, run: Callable[..., Any], at: Time
) -> None:
    numbers: list[int] = []

    async def act(producer: AsyncStreamProducer) -> None:
        script: Any = producer._add
        lost = [3]

        async def losing(keys: Any, args: Any) -> Any:
            numbers.append(args[1])
            answer = await script(keys=keys, args=args)
            if lost[0]:
                lost[0] -= 1
                raise redis.ConnectionError("lost")
            return answer

        producer._add = losing  # type: ignore[assignment]
        await producer.send_many(named(1, 2))
        lost[0] = 10**6
        with pytest.raises(UnconfirmedEntriesError):
            await producer.send("t3")

    run(act, timeout_s=1.0)
    assert waiting(client) == named(1, 2, 3)
    assert Counter(numbers)[1] == 4
    assert set(numbers) == {1, 2}


@pytest.mark.parametrize("streams", [1, 2])
def test_asynchronous_ones_rest_for_their_own_work_alone(
    client: redis.Redis, options: Settings, run: Callable[..., Any], at: Time, streams: int
) -> None:
    publish(client, Level.SEVERE, capacity=1000)

    async def act(producer: AsyncStreamProducer) -> None:
        async with AsyncStreamProducer(S, options=options) as other:
            used = [producer, other][:streams]
            for each in used:
                await each.send("x")
            for _ in range(10):
                at.now += 0.25
                for each in used:
                    await each.send("x")

    run(act)
    assert at.slept == [0.25] * 10


def test_a_real_clock_holds_for_both(client: redis.Redis, options: Settings) -> None:
    with StreamProducer(S, options=options) as producer:
        producer.send("t0")

    async def act() -> None:
        async with AsyncStreamProducer(S, options=options) as other:
            await other.send("t1")

    asyncio.run(act())
    wait_until(lambda: waiting(client) == named(0, 1))
