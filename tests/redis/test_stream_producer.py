"""Producers on a real server: what is accepted is in the stream, once, in order, never too much."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from sutra_tasks import connections, keys
from sutra_tasks.errors import (
    BackpressureSignal,
    BrokerNotConfiguredError,
    InvalidInputError,
    InvalidOptionError,
    UnconfirmedEntriesError,
)
from sutra_tasks.host.embedded_server import free_port
from sutra_tasks.settings import Settings
from sutra_tasks.streaming.backpressure import Level
from sutra_tasks.streaming.client.producer import AsyncStreamProducer, StreamProducer
from sutra_tasks.streaming.client.producer_core import FREE_SHARE, RETRY_AFTER_S
from sutra_tasks.streaming.client.steps import REPEAT_S, RunScript, Step
from sutra_tasks.streaming.entries import LOW_PRIORITY, StreamEntry
from sutra_tasks.streaming.upkeep_store import StreamState, UpkeepStore
from tests.redis.peers import full_memory
from tests.redis.stream_clients import PRODUCERS, Producer

S = "s"
IN, CLOSED, TOTALS = (keys.stream(S, part) for part in ("in", "closed", "totals"))
CAPACITY = 10


@pytest.fixture(autouse=True)
def _swept(_nothing_is_left_behind: None, client: redis.Redis) -> Iterator[None]:
    """Only what was sent lasts, and that there is a stream."""
    yield
    client.delete(IN, CLOSED, keys.streams())


class Time:
    """A clock that goes on only when somebody sleeps."""

    def __init__(self) -> None:
        self.now, self.slept = 1000.0, list[float]()
        self.while_sleeping: Callable[[], object] = lambda: None

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.slept.append(seconds)
        self.now += seconds
        self.while_sleeping()

    async def async_sleep(self, seconds: float) -> None:
        self.sleep(seconds)


@pytest.fixture
def at() -> Time:
    """Time as this test's producers see it."""
    return Time()


@pytest.fixture
def options(url: str) -> Settings:
    return Settings(broker_url=url, stream_buffer_size=CAPACITY)


@pytest.fixture(params=PRODUCERS)
def open_producer(
    request: pytest.FixtureRequest, options: Settings, at: Time, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Producer]]:
    """``open_producer(...)``: a producer of each kind that sleeps in this test's time."""
    opened: list[Producer] = []
    runner = None
    own_time: dict[str, Any] = {"clock": at, "sleep": at.sleep}
    if request.param != "sync":
        runner = asyncio.Runner()
        own_time = {"runner": runner}  # time in producers is counted by the task
        monkeypatch.setattr("time.monotonic", at)
        monkeypatch.setattr("asyncio.sleep", at.async_sleep)

    def open_one(**given: Any) -> Producer:
        found = PRODUCERS[request.param](S, **{"options": options, **own_time, **given})
        opened.append(found)
        return found

    yield open_one
    for one in opened:
        one.close()
    if runner is not None:
        runner.close()


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
    client: redis.Redis, open_producer: Callable[..., Producer]
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
    assert client.smembers(keys.streams()) == {S.encode()}
    assert totals(client) == {"accepted": 6}
    assert client.ttl(TOTALS) > 0


def test_a_whole_number_is_an_id(client: redis.Redis, open_producer: Callable[..., Producer]) -> None:
    producer = open_producer()
    assert producer.send("x", id=0) == "0"
    assert producer.send_many([StreamEntry("y", id=42, key=7), StreamEntry("z", id="42")]) == 2
    found: Any = client.xrange(IN)
    assert [(one[b"id"], one.get(b"key")) for _, one in found] == [
        (b"0", None),
        (b"42", b"7"),
        (b"42", None),
    ]


def test_an_id_is_made_for_a_text_without_one_and_is_told(
    client: redis.Redis, open_producer: Callable[..., Producer]
) -> None:
    producer, other = open_producer(), open_producer()
    told = [producer.send("a"), producer.send(StreamEntry("b")), other.send("c")]
    found: Any = client.xrange(IN)
    assert [fields[b"id"].decode() for _, fields in found] == told
    assert len(set(told)) == 3


def test_a_stream_never_holds_more_than_its_capacity(
    client: redis.Redis, open_producer: Callable[..., Producer]
) -> None:
    producer = open_producer(wait=False)
    with pytest.raises(BackpressureSignal) as told:
        producer.send_many(named(*range(25)))
    assert waiting(client) == named(*range(CAPACITY))
    assert (told.value.size, told.value.capacity, told.value.throttle_rate) == (CAPACITY, CAPACITY, 1.0)
    assert RETRY_AFTER_S[0] <= told.value.retry_after_s <= RETRY_AFTER_S[1]
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
    client: redis.Redis, open_producer: Callable[..., Producer]
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
    client: redis.Redis, open_producer: Callable[..., Producer]
) -> None:
    for number in range(CAPACITY + 5):
        client.xadd(IN, {"text": number})
    with pytest.raises(BackpressureSignal) as told:
        open_producer(wait=False).send("x")
    assert (told.value.size, client.xlen(IN)) == (CAPACITY + 5, CAPACITY + 5)


def test_what_can_wait_is_shed_under_pressure_and_its_producer_is_told(
    client: redis.Redis, open_producer: Callable[..., Producer]
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
    client: redis.Redis, open_producer: Callable[..., Producer]
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
    client: redis.Redis, open_producer: Callable[..., Producer]
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


@pytest.mark.parametrize("free", [0, 2, 5])
def test_a_batch_that_is_sent_again_adds_nothing_and_is_answered_the_same(
    client: redis.Redis, options: Settings, free: int
) -> None:
    publish(client, Level.NORMAL, capacity=free or 1)
    with StreamProducer(S, options=options) as producer:
        if not free:
            producer.send("full")
        batch = producer._core._request([StreamEntry(text) for text in named(*range(4))])
        first = producer._perform(batch)
        take(client, 9)
        again = producer._perform(batch)
        assert first[0] == again[0] == min(4, free)
        assert client.xlen(IN) == 0
        assert producer.send("next")
    assert waiting(client) == ["next"]


def test_producers_do_not_take_each_others_batches_for_their_own(
    client: redis.Redis, open_producer: Callable[..., Producer]
) -> None:
    for _ in range(2):
        for number in range(2):
            open_producer().send(f"{number}")
    assert waiting(client) == ["0", "1", "0", "1"]


FORKED = """
import os, sys
from sutra_tasks import Settings, StreamProducer

with StreamProducer("s", options=Settings(broker_url=sys.argv[1])) as producer:
    sent = producer.send_many(["before"])
    pid = os.fork()
    ids = {producer.send("after"), producer.send("after")}
    if not pid:
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
"""


def test_what_a_forked_child_sends_is_not_taken_for_its_parents(client: redis.Redis, url: str) -> None:
    subprocess.run([sys.executable, "-c", FORKED, url], check=True, timeout=60)
    assert waiting(client) == ["before", *["after"] * 4]
    entries: Any = client.xrange(IN)
    assert len({fields[b"id"] for _, fields in entries}) == 5


def lose_answers(producer: Producer, count: int, error: Exception) -> None:
    """Have the next scripts of a producer run on the server, and their answers lost."""
    perform, left = producer._perform, count

    def lost(step: Step) -> bool:
        nonlocal left
        left -= isinstance(step, RunScript)
        return isinstance(step, RunScript) and left >= 0

    def on_thread(step: Step) -> Any:
        answer = perform(step)
        if lost(step):
            raise error
        return answer

    async def on_loop(step: Step) -> Any:
        answer = await perform(step)
        if lost(step):
            raise error
        return answer

    producer._perform = on_thread if isinstance(producer, StreamProducer) else on_loop


@pytest.mark.parametrize(
    "error", [redis.ConnectionError(), redis.TimeoutError(), redis.OutOfMemoryError(), OSError()]
)
def test_a_batch_whose_answer_was_lost_is_in_the_stream_once(
    client: redis.Redis, open_producer: Callable[..., Producer], at: Time, error: Exception
) -> None:
    producer = open_producer(batch=4)
    lose_answers(producer, 3, error)
    assert producer.send_many(named(*range(6))) == 6
    assert waiting(client) == named(*range(6))
    assert at.slept == [REPEAT_S] * 3


def test_a_server_that_never_answers_leaves_it_open_whether_it_has_them(
    client: redis.Redis, open_producer: Callable[..., Producer], at: Time
) -> None:
    producer = open_producer(timeout_s=2.0)
    lose_answers(producer, 10**6, redis.ConnectionError("lost"))
    with pytest.raises(UnconfirmedEntriesError) as told:
        producer.send_many(named(1, 2))
    entries: Any = client.xrange(keys.stream(S, "in"))
    assert told.value.ids == [fields[b"id"].decode() for _, fields in entries]
    assert told.value.reason == "lost"
    assert 2.0 <= at.now - 1000 <= 2.0 + REPEAT_S
    assert waiting(client) == named(1, 2)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_server_that_is_not_there_is_an_error_after_a_while(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(connections, "RETRIES", 1)
    away = Settings(broker_url=f"redis://127.0.0.1:{free_port()}/0")
    with (
        PRODUCERS[kind](S, timeout_s=0, options=away) as producer,
        pytest.raises(UnconfirmedEntriesError),
    ):
        producer.send("x")


def test_a_full_server_is_waited_for(
    client: redis.Redis, open_producer: Callable[..., Producer], at: Time
) -> None:
    def free() -> None:
        if len(at.slept) == 3:
            client.config_set("maxmemory", "0")

    at.while_sleeping = free
    with full_memory(client):
        open_producer().send("x")
    assert waiting(client) == ["x"]
    assert at.slept == [REPEAT_S] * 3


# Streams that take no more for now.


def test_a_producer_that_waits_sends_all_when_there_is_room(
    client: redis.Redis, open_producer: Callable[..., Producer], at: Time
) -> None:
    got: list[str] = []
    at.while_sleeping = lambda: got.extend(take(client, 4))
    publish(client, Level.NORMAL, per_s=5.0)
    assert open_producer(batch=8).send_many(named(*range(30))) == 30
    assert got + waiting(client) == named(*range(30))
    assert set(at.slept) == {FREE_SHARE * CAPACITY / 5.0}
    assert totals(client)["accepted"] == 30


def test_a_producer_does_not_wait_for_longer_than_it_was_told_to(
    client: redis.Redis, open_producer: Callable[..., Producer], at: Time
) -> None:
    producer = open_producer(timeout_s=3.1)
    producer.send_many(named(*range(CAPACITY)))
    with pytest.raises(BackpressureSignal):
        producer.send("x")
    assert sum(at.slept) == pytest.approx(3.1)
    assert waiting(client) == named(*range(CAPACITY))


def test_one_that_offers_is_told_and_then_has_sent_everything_once(
    client: redis.Redis, open_producer: Callable[..., Producer], at: Time
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


@pytest.mark.parametrize("method", ["send_many", "offer"])
def test_what_is_before_a_text_that_cannot_be_embedded_is_in_the_stream(
    client: redis.Redis, open_producer: Callable[..., Producer], method: str
) -> None:
    bad: Any = 5
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
    client: redis.Redis, open_producer: Callable[..., Producer]
) -> None:
    def failing() -> Iterator[str]:
        yield from named(1, 2, 3)
        raise LookupError

    with pytest.raises(LookupError):
        open_producer(batch=2).send_many(failing())
    assert waiting(client) == named(1, 2, 3)


def test_what_cannot_be_is_refused_when_a_producer_is_made(options: Settings) -> None:
    for kind in (StreamProducer, AsyncStreamProducer):
        with pytest.raises(InvalidOptionError, match="batch"):
            kind(S, batch=0, options=options)
        with pytest.raises(InvalidOptionError, match="stream"):
            kind("a b", options=options)
        with pytest.raises(BrokerNotConfiguredError):
            kind(S, options=Settings())


# How fast they go.


@pytest.mark.parametrize("streams", [1, 2])
def test_a_throttled_producer_rests_for_its_own_work_alone(
    client: redis.Redis, open_producer: Callable[..., Producer], at: Time, streams: int
) -> None:
    publish(client, Level.SEVERE, capacity=1000)
    producers = [open_producer() for _ in range(streams)]
    for producer in producers:
        producer.send("x")
    for _ in range(10):
        at.now += 0.25
        for producer in producers:
            producer.send("x")
    assert {producer.throttle_rate for producer in producers} == {0.5}
    assert at.slept == [0.25] * 10


def test_a_real_clock_holds_for_both(client: redis.Redis, options: Settings) -> None:
    for number, kind in enumerate(("sync", "async")):
        with PRODUCERS[kind](S, options=options) as producer:
            producer.send(f"t{number}")
    assert waiting(client) == named(0, 1)
