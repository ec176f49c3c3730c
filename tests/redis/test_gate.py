"""A worker takes only what it may, acknowledges all the same, and lets no priority starve."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
from kombu.asynchronous import Hub, set_event_loop

from sutra_tasks.broker.queues import lane
from sutra_tasks.broker.take_protocol import BACKWARDS_EVERY
from tests.redis.flow import message, numbers, send
from tests.redis.peers import Receiver, waiting

if TYPE_CHECKING:
    import redis
    from kombu import Message

    from sutra_tasks.broker.in_flight import InFlightMessages

Receive = Callable[..., Receiver]


@pytest.fixture(autouse=True)
def _swept(_nothing_is_left_behind: None, client: redis.Redis) -> Iterator[None]:
    """What a test leaves waiting is its own business."""
    yield
    client.flushdb()


@pytest.fixture
def receive(open_receiver: Receive, in_flight: InFlightMessages) -> Receive:
    """Open a connection of this one process over our transport."""

    def open_one(*queues: str, **options: object) -> Receiver:
        return open_receiver(*queues, in_flight=in_flight, **options)

    return open_one


@pytest.fixture
def hub() -> Iterator[Hub]:
    """Celery's event loop, as a worker runs it."""
    loop = Hub()
    set_event_loop(loop)
    yield loop
    loop.close()
    set_event_loop(None)


def ids(messages: list[Message]) -> list[int]:
    return [int(one.headers["id"]) for one in messages]


def test_a_worker_that_may_not_take_takes_nothing(
    receive: Receive, client: redis.Redis, in_flight: InFlightMessages
) -> None:
    in_flight.may_take = lambda _: False
    for number in range(20):
        send(client, message(number, priority=number % 10), queue="q")
    assert receive("q").take_all() == []
    assert len(waiting(client, "q")) == 20
    assert not client.exists(in_flight.key)


def test_a_worker_that_may_not_take_sends_what_is_pending(
    receive: Receive, client: redis.Redis, in_flight: InFlightMessages
) -> None:
    send(client, *(message(number) for number in range(5)), queue="q")
    receiver = receive("q", prefetch=3)
    done, forwarded, kept = receiver.take_all()
    in_flight.may_take = lambda _: False
    done.ack()
    receiver.channel.forward(forwarded, "gpu0")
    assert receiver.take_all() == []
    assert numbers(client.lrange(in_flight.key, 0, -1)) == ids([kept])  # type: ignore[arg-type]  # not async
    assert numbers(waiting(client, "sutra.device.gpu0")) == ids([forwarded])
    assert not in_flight.has_pending
    assert numbers(waiting(client, "q")) == [3, 4]


def test_a_worker_that_may_take_again_takes_what_waited(
    receive: Receive, client: redis.Redis, in_flight: InFlightMessages
) -> None:
    in_flight.may_take = lambda _: False
    receiver = receive("q")
    send(client, *(message(number) for number in range(5)), queue="q")
    assert receiver.take_all() == []
    in_flight.may_take = lambda _: True
    assert ids(receiver.take(5)) == [0, 1, 2, 3, 4]


def test_a_worker_that_may_not_take_from_one_queue_takes_from_the_others(
    receive: Receive, client: redis.Redis, in_flight: InFlightMessages
) -> None:
    in_flight.may_take = lambda queue: queue != "closed"
    receiver = receive("closed", "open")
    for turn in range(3):
        for number, queue in enumerate(("closed", "open")):
            send(client, message(10 * turn + number, priority=3 * turn), queue=queue)
        assert ids(receiver.take_all()) == [10 * turn + 1]
    in_flight.may_take = lambda _: True
    assert ids(receiver.take(3)) == [0, 10, 20]


def test_what_was_pending_over_a_dropped_connection_is_sent_by_a_worker_that_may_not_take(
    receive: Receive, client: redis.Redis, in_flight: InFlightMessages
) -> None:
    send(client, message(0), queue="q")
    receiver = receive("q")
    [done] = receiver.take(1)
    in_flight.may_take = lambda _: False
    receiver.take_all()  # the take that was under way
    done.ack()
    client.client_pause(500)  # what is sent does not reach the server
    receiver.channel.connection.cycle.on_poll_start()
    receiver.channel.client.connection.disconnect()
    receiver.take_all()
    assert not client.exists(in_flight.key)


def test_a_worker_that_may_not_take_and_has_nothing_pending_sends_nothing(
    receive: Receive, client: redis.Redis, in_flight: InFlightMessages
) -> None:
    in_flight.may_take = lambda _: False
    receiver = receive("q")
    receiver.take_all()
    assert not receiver.channel._in_poll
    before = client.info("stats")["total_commands_processed"]
    receiver.take_all()
    assert client.info("stats")["total_commands_processed"] == before + 1  # the question itself


@pytest.mark.parametrize("how", ["ack", "drop", "requeue"])
def test_a_worker_that_may_take_again_takes_the_next_message_at_once(
    receive: Receive, client: redis.Redis, in_flight: InFlightMessages, hub: Hub, how: str
) -> None:
    poll, slept, could_take = hub.poller.poll, [], []

    def listen(timeout: float) -> list[object]:
        events: list[object] = poll(timeout) or []
        if not events:
            slept.append(timeout)  # for a second: nobody woke the loop
        return events

    hub.poller.poll = listen
    send(client, *(message(number) for number in range(20)), queue="q")
    in_flight.may_take = lambda _: in_flight.credit_used < 1
    arrived: list[int] = []
    threads: list[threading.Thread] = []

    def end_elsewhere(one: Message) -> None:
        assert client.llen(in_flight.key) == 1
        end = one.ack
        if how == "drop":
            end = one.reject
        elif how == "requeue" and "redelivered" not in one.headers:
            end = one.requeue
        arrived.extend(ids([one]))
        threads.append(threading.Thread(target=end))
        threads[-1].start()

    receiver = receive("q", prefetch=1, on_message=end_elsewhere)
    channel, wake = receiver.channel, receiver.channel.wake

    def note_and_wake() -> None:
        could_take.append(channel.qos.can_consume())
        wake()

    channel.wake = note_and_wake
    receiver.connection.register_with_event_loop(hub)
    while client.llen("q") or client.llen(in_flight.key):
        hub.run_once()
    assert slept == []
    assert all(could_take)  # when it was woken: else it may look, and sleep again, before there is
    for thread in threads:
        thread.join()
    assert sorted(set(arrived)) == list(range(20))


# --- no priority starves -----------------------------------------------------------------------------


@pytest.mark.parametrize("last", [9, 6, 3])
def test_the_last_lane_has_a_turn_however_much_waits_in_the_first(
    receive: Receive, client: redis.Redis, last: int
) -> None:
    urgent, late = range(200), range(1000, 1003)
    send(client, *(message(number, priority=last) for number in late), queue="q")
    send(client, *(message(number) for number in urgent), queue="q")
    receiver = receive("q", prefetch=1)
    arrived = []
    for _ in range(4 * BACKWARDS_EVERY):
        [one] = receiver.take(1)
        arrived += ids([one])
        one.ack()
    assert [arrived.index(number) for number in late] == [
        turn * BACKWARDS_EVERY - 1 for turn in (1, 2, 3)
    ]
    assert [number for number in arrived if number < 1000] == list(range(4 * BACKWARDS_EVERY - 3))


def test_urgent_messages_that_come_one_by_one_do_not_keep_others_waiting(
    receive: Receive, client: redis.Redis
) -> None:
    receiver = receive("q")
    receiver.drain_until(lambda: receiver.channel._protocol.idle)  # it waits on its first lane next
    arrived: list[int] = []
    while -1 not in arrived and len(arrived) < 1000:
        if len(arrived) == 5:
            send(client, message(-1, priority=9), queue="q")
        if not client.llen(lane("q", 0)):
            send(client, message(len(arrived)), queue="q")
        arrived += ids(receiver.take(1))
    assert len(arrived) < 1000
