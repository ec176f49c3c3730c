"""A message in flight is in exactly one place at every moment, whatever fails."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
import redis

from sutra_tasks import keys
from sutra_tasks.broker.in_flight import InFlightMessages, in_flight_of
from sutra_tasks.broker.queues import lane, lanes, new_incarnation
from sutra_tasks.broker.requeue import MESSAGES_PER_CALL, requeue_in_flight
from tests.redis.flow import message as sent_message
from tests.redis.flow import take
from tests.redis.peers import absent_server, full_memory, waiting

Put = Callable[..., list[bytes]]
TakeAll = Callable[..., list[bytes]]

OTHER = keys.device_queue("other")


def ask(
    in_flight: InFlightMessages, client: redis.Redis, *queues: str, **limits: int
) -> list[tuple[bytes, bytes]]:
    """Send what is pending and take from queues."""
    return take(client, in_flight, [name for queue in queues for name in lanes(queue)], **limits)


@pytest.fixture
def take_all(client: redis.Redis, in_flight: InFlightMessages, put: Put) -> TakeAll:
    """Send to the queue ``q`` and take everything, as the channel's script does; oldest first."""

    def send_and_take(*bodies: object, priority: int = 0) -> list[bytes]:
        messages = put("q", *bodies, priority=priority)
        assert [raw for _, raw in ask(in_flight, client, "q", most_messages=len(messages))] == messages
        return messages

    return send_and_take


@pytest.fixture
def unreachable() -> redis.Redis:
    return absent_server()


def unmarked(raw: bytes | str) -> dict[str, Any]:
    """Return a message that was requeued as it was before, having checked its marks."""
    message: dict[str, Any] = json.loads(raw)
    assert message["headers"].pop("redelivered") is True
    assert message["properties"]["delivery_info"].pop("redelivered") is True
    return message


def test_requeuing_changes_nothing_but_the_marks(
    take_all: TakeAll, in_flight: InFlightMessages, client: redis.Redis, leaves: set[str]
) -> None:
    [raw] = take_all({"texts": ["é"]}, priority=6)
    assert requeue_in_flight(client, in_flight.incarnation, "q") == 1
    leaves.add(lane("q", 6))
    [returned] = client.lrange(lane("q", 6), 0, -1)
    assert unmarked(returned) == json.loads(raw)
    assert not client.exists(in_flight.key)


def test_what_is_requeued_is_next_and_in_the_order_it_was_taken(
    take_all: TakeAll, in_flight: InFlightMessages, put: Put, client: redis.Redis, leaves: set[str]
) -> None:
    taken = take_all(*range(5))
    waited = put("q", "later")
    assert requeue_in_flight(client, in_flight.incarnation, "q") == 5
    leaves.add("q")
    *returned, last = waiting(client, "q")
    assert [unmarked(raw) for raw in returned] == [json.loads(raw) for raw in taken]
    assert [last] == waited


def test_requeuing_nothing_is_harmless(client: redis.Redis) -> None:
    assert requeue_in_flight(client, "never.started") == 0


def test_callers_that_requeue_at_once_double_and_lose_nothing(
    take_all: TakeAll, in_flight: InFlightMessages, url: str, client: redis.Redis, leaves: set[str]
) -> None:
    taken = take_all(*range(60))
    start, given = threading.Barrier(4), []

    def requeue() -> None:
        with redis.Redis.from_url(url) as own:
            start.wait()
            given.append(requeue_in_flight(own, in_flight.incarnation, "q"))

    threads = [threading.Thread(target=requeue) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    leaves.add("q")
    assert sum(given) == 60
    tags = [json.loads(raw)["properties"]["delivery_tag"] for raw in waiting(client, "q")]
    assert sorted(tags) == sorted(json.loads(raw)["properties"]["delivery_tag"] for raw in taken)


class DiesAfter(redis.Redis):
    """A client whose process is killed after ``left`` scripts."""

    left = 2

    def evalsha(self, *args: Any) -> Any:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        return super().evalsha(*args)


def test_requeuing_can_be_taken_up_where_another_died(
    take_all: TakeAll, in_flight: InFlightMessages, url: str, client: redis.Redis, leaves: set[str]
) -> None:
    taken = take_all(*range(2 * MESSAGES_PER_CALL + 5))
    with DiesAfter.from_url(url) as dying, pytest.raises(KeyboardInterrupt):
        requeue_in_flight(dying, in_flight.incarnation, "q")
    leaves.add("q")
    assert client.llen("q") + client.llen(in_flight.key) == 2 * MESSAGES_PER_CALL + 5
    assert requeue_in_flight(client, in_flight.incarnation, "q") == 5
    assert [unmarked(raw) for raw in waiting(client, "q")] == [json.loads(raw) for raw in taken]


def test_a_full_server_still_requeues_what_is_in_flight(
    take_all: TakeAll, in_flight: InFlightMessages, client: redis.Redis, leaves: set[str]
) -> None:
    take_all(*range(3))
    with full_memory(client):
        assert requeue_in_flight(client, in_flight.incarnation, "q") == 3
    leaves.add("q")
    assert client.llen("q") == 3


def test_one_process_has_one_object_for_its_messages_in_flight() -> None:
    name = new_incarnation("t")
    assert in_flight_of(name) is in_flight_of(name)
    assert in_flight_of(name) is not in_flight_of(new_incarnation("t"))


def test_taking_serves_lists_in_order_and_names_each_messages_list(
    in_flight: InFlightMessages, put: Put, client: redis.Redis
) -> None:
    low = put("q", "low", priority=9)
    high = put("q", "high")[:1]
    taken = ask(in_flight, client, "q", most_messages=5)
    assert taken == [(b"q", *high), (lane("q", 9).encode(), *low)]
    assert client.lrange(in_flight.key, 0, -1) == [*low, *high]
    for _, raw in taken:
        in_flight.acknowledge(raw)
    ask(in_flight, client)


@pytest.mark.parametrize(("limits", "expected"), [((0, 9**9), 0), ((2, 9**9), 2), ((9, 1), 1)])
def test_taking_stops_at_its_number_and_at_the_message_that_fills_its_bytes(
    in_flight: InFlightMessages, put: Put, client: redis.Redis, limits: tuple[int, int], expected: int
) -> None:
    sent = put("q", *range(4))
    room, most_bytes = limits
    taken = ask(in_flight, client, "q", most_messages=room, most_bytes=most_bytes)
    assert [raw for _, raw in taken] == sent[:expected]
    assert waiting(client, "q") == sent[expected:]
    client.flushdb()


def test_the_next_take_sends_what_is_acknowledged(
    take_all: TakeAll, in_flight: InFlightMessages, client: redis.Redis
) -> None:
    for raw in take_all(*range(3)):
        in_flight.acknowledge(raw)
    assert in_flight.has_pending
    assert client.llen(in_flight.key) == 3
    ask(in_flight, client)
    assert not client.exists(in_flight.key)
    assert not in_flight.has_pending


def test_what_could_not_be_sent_is_sent_with_the_next_take(
    take_all: TakeAll, in_flight: InFlightMessages, client: redis.Redis, unreachable: redis.Redis
) -> None:
    first, second, third = take_all(*range(3))
    in_flight.acknowledge(first)
    in_flight.forward(second, "other", 3, weight=0)
    with pytest.raises(redis.ConnectionError):
        ask(in_flight, unreachable)
    assert in_flight.has_pending
    in_flight.acknowledge(third)
    ask(in_flight, client)
    assert not client.exists(in_flight.key)
    assert client.lpop(lane(OTHER, 3)) == second
    assert client.keys() == []


def test_what_could_not_be_sent_on_requeuing_is_sent_the_next_time(
    take_all: TakeAll,
    in_flight: InFlightMessages,
    client: redis.Redis,
    unreachable: redis.Redis,
    leaves: set[str],
) -> None:
    done, unfinished = take_all(*range(2))
    in_flight.acknowledge(done)
    with pytest.raises(redis.ConnectionError):
        in_flight.requeue_unclaimed(unreachable, "q")
    assert in_flight.requeue_unclaimed(client, "q") == 1
    leaves.add("q")
    assert [unmarked(raw) for raw in waiting(client, "q")] == [json.loads(unfinished)]
    assert not client.exists(in_flight.key)


def test_threads_may_acknowledge_while_another_takes(
    take_all: TakeAll, in_flight: InFlightMessages, client: redis.Redis
) -> None:
    messages = take_all(*range(200))

    def acknowledge(part: list[bytes]) -> None:
        for raw in part:
            in_flight.acknowledge(raw)

    threads = [threading.Thread(target=acknowledge, args=[messages[i::4]]) for i in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        ask(in_flight, client)
    ask(in_flight, client)
    assert not client.exists(in_flight.key)


@pytest.mark.parametrize("priority", [0, 1, 3, 5, 6, 8, 9])
def test_a_forwarded_message_keeps_its_bytes_and_its_lane(
    take_all: TakeAll, in_flight: InFlightMessages, client: redis.Redis, leaves: set[str], priority: int
) -> None:
    [raw] = take_all({"texts": ["é", "\\u00e9", '"', "\0"]})
    in_flight.forward(raw, "a", priority, weight=0)
    ask(in_flight, client)
    leaves.add(lane("sutra.device.a", priority))
    assert client.lrange(lane("sutra.device.a", priority), 0, -1) == [raw]
    assert not client.exists(in_flight.key)


def test_forwarding_keeps_order_and_reaches_each_destination(
    take_all: TakeAll, in_flight: InFlightMessages, client: redis.Redis, leaves: set[str]
) -> None:
    messages = take_all(*range(6))
    for i, raw in enumerate(messages):
        in_flight.forward(raw, f"d{i % 2}", 0, weight=0)
    ask(in_flight, client)
    leaves.update(map(keys.device_queue, ("d0", "d1")))
    assert waiting(client, keys.device_queue("d0")) == messages[0::2]
    assert waiting(client, keys.device_queue("d1")) == messages[1::2]


def test_one_command_acknowledges_forwards_and_takes(
    take_all: TakeAll, in_flight: InFlightMessages, put: Put, client: redis.Redis, leaves: set[str]
) -> None:
    done, forwarded, unfinished = take_all(*range(3))
    sent = put("q", *range(3))
    in_flight.acknowledge(done)
    in_flight.forward(forwarded, "other", 0, weight=0)
    assert [raw for _, raw in ask(in_flight, client, "q", most_messages=2)] == sent[:2]
    leaves.update({"q", OTHER, in_flight.key})
    assert waiting(client, OTHER) == [forwarded]
    assert client.lrange(in_flight.key, 0, -1) == [*sent[1::-1], unfinished]


def test_a_message_that_was_requeued_meanwhile_is_not_forwarded(
    take_all: TakeAll, in_flight: InFlightMessages, client: redis.Redis, leaves: set[str]
) -> None:
    [raw] = take_all("text")
    in_flight.forward(raw, "other", 0, weight=0)
    requeue_in_flight(client, in_flight.incarnation, "q")
    ask(in_flight, client)
    leaves.add("q")
    assert client.llen("q") == 1
    assert not client.exists(OTHER)


class LosesAnswers(redis.Redis):
    """A client that reaches the server but never hears that it did."""

    def execute_command(self, *args: Any, **options: Any) -> Any:
        super().execute_command(*args, **options)  # type: ignore[no-untyped-call]
        raise redis.ConnectionError("lost")


def test_forwarding_again_because_the_answer_was_lost_pushes_once(
    take_all: TakeAll, in_flight: InFlightMessages, url: str, client: redis.Redis, leaves: set[str]
) -> None:
    first, second = take_all(*range(2))
    in_flight.forward(first, "other", 0, weight=0)
    in_flight.acknowledge(second)
    with LosesAnswers.from_url(url) as unlucky, pytest.raises(redis.ConnectionError):
        ask(in_flight, unlucky)
    ask(in_flight, client)
    leaves.add(OTHER)
    assert client.lrange(OTHER, 0, -1) == [first]
    assert not client.exists(in_flight.key)


def test_what_was_taken_but_never_heard_of_is_requeued(
    take_all: TakeAll, in_flight: InFlightMessages, url: str, client: redis.Redis, leaves: set[str]
) -> None:
    forwarded, waits = take_all("routed", "text")
    client.lmove(in_flight.key, "q", "LEFT", "RIGHT")
    in_flight.forward(forwarded, "other", 0, weight=0)
    with LosesAnswers.from_url(url) as unlucky, pytest.raises(redis.ConnectionError):
        ask(in_flight, unlucky, "q", most_messages=1)
    assert client.llen(in_flight.key) == 1
    assert in_flight.requeue_unclaimed(client, "q") == 1
    leaves.update({"q", OTHER})
    assert [unmarked(raw) for raw in waiting(client, "q")] == [json.loads(waits)]
    assert waiting(client, OTHER) == [forwarded]


def test_a_full_server_still_forwards(
    take_all: TakeAll, in_flight: InFlightMessages, client: redis.Redis, leaves: set[str]
) -> None:
    [raw] = take_all("text")
    in_flight.forward(raw, "other", 0, weight=0)
    with full_memory(client):
        ask(in_flight, client)
    leaves.add(OTHER)
    assert client.lrange(OTHER, 0, -1) == [raw]


def test_requeuing_sends_what_is_pending_and_requeues_the_rest(
    take_all: TakeAll, in_flight: InFlightMessages, client: redis.Redis, leaves: set[str]
) -> None:
    done, forwarded, unfinished = take_all(*range(3))
    in_flight.acknowledge(done)
    in_flight.forward(forwarded, "other", 0, weight=0)
    assert in_flight.requeue_unclaimed(client, "q") == 1
    leaves.update({"q", OTHER})
    assert [unmarked(raw) for raw in waiting(client, "q")] == [json.loads(unfinished)]
    assert client.lrange(OTHER, 0, -1) == [forwarded]
    assert set(client.keys()) == {b"q", OTHER.encode()}


def test_a_process_requeues_only_its_own(
    take_all: TakeAll, in_flight: InFlightMessages, client: redis.Redis, leaves: set[str]
) -> None:
    take_all("text")
    assert InFlightMessages(new_incarnation("t")).requeue_unclaimed(client, "q") == 0
    leaves.add(in_flight.key)
    assert client.llen(in_flight.key) == 1


def test_a_process_requeues_nothing_that_one_of_its_consumers_has(
    take_all: TakeAll, in_flight: InFlightMessages, client: redis.Redis, leaves: set[str]
) -> None:
    had, unclaimed, unheard_of = take_all(*range(3))
    in_flight.delivered(had, "q")
    in_flight.delivered(unclaimed, "its own")
    in_flight.consumer_gone(unclaimed)
    assert in_flight.requeue_unclaimed(client, "q") == 2
    leaves.update({"q", "its own", in_flight.key})
    assert [unmarked(raw) for raw in waiting(client, "q")] == [json.loads(unheard_of)]
    assert [unmarked(raw) for raw in waiting(client, "its own")] == [json.loads(unclaimed)]
    assert client.lrange(in_flight.key, 0, -1) == [had]


def test_what_could_not_be_requeued_is_requeued_later_to_its_own_queue(
    take_all: TakeAll,
    in_flight: InFlightMessages,
    client: redis.Redis,
    unreachable: redis.Redis,
    leaves: set[str],
) -> None:
    [raw] = take_all("text")
    in_flight.delivered(raw, "its own", tokens=1, weight=0)
    with pytest.raises(redis.ConnectionError):
        in_flight.requeue(unreachable, raw, "its own")
    assert in_flight.credit_used == 0
    assert in_flight.requeue_unclaimed(client, "q") == 1
    assert in_flight.requeue_unclaimed(client, "q") == 0
    leaves.add("its own")
    assert [unmarked(one) for one in waiting(client, "its own")] == [json.loads(raw)]
    assert not client.exists(in_flight.key)


def test_what_a_dead_process_had_in_flight_goes_to_the_router(
    take_all: TakeAll, in_flight: InFlightMessages, client: redis.Redis, leaves: set[str]
) -> None:
    take_all("text", priority=3)
    assert requeue_in_flight(client, in_flight.incarnation) == 1
    leaves.add(lane(keys.EMBED_QUEUE, 3))
    assert len(waiting(client, keys.EMBED_QUEUE)) == 1


@pytest.mark.parametrize("poison", [b"not json", b"{}", b'{"properties": {}}', b"[]", b"\xff"])
def test_what_is_no_message_is_requeued_as_it_is_among_others(
    take_all: TakeAll, in_flight: InFlightMessages, client: redis.Redis, leaves: set[str], poison: bytes
) -> None:
    take_all("text")
    client.lpush(in_flight.key, poison)
    client.rpush(in_flight.key, poison)
    assert requeue_in_flight(client, in_flight.incarnation, "q") == 3
    leaves.add("q")
    first, _, last = waiting(client, "q")
    assert (first, last) == (poison, poison)
    assert not client.exists(in_flight.key)


def test_a_message_without_headers_can_be_requeued(
    take_all: TakeAll, in_flight: InFlightMessages, client: redis.Redis, leaves: set[str]
) -> None:
    message = json.loads(take_all("text")[0])
    client.lset(in_flight.key, 0, json.dumps({**message, "headers": None}))
    assert requeue_in_flight(client, in_flight.incarnation, "q") == 1
    leaves.add("q")
    [returned] = waiting(client, "q")
    assert unmarked(returned) == {**message, "headers": {}}


@pytest.mark.parametrize("queue", [keys.DISTILL_QUEUE, keys.CONTROL_QUEUE])
def test_what_a_dead_process_had_of_another_queue_is_requeued_there(
    client: redis.Redis, leaves: set[str], queue: str
) -> None:
    raw = sent_message(1, routing_key=queue)
    client.lpush(keys.in_flight("distill.1"), raw)
    assert requeue_in_flight(client, "distill.1", died=True) == 1
    leaves.add(queue)
    assert [json.loads(one)["headers"]["id"] for one in waiting(client, queue)] == ["1"]
    assert not client.exists(keys.EMBED_QUEUE)
