"""A load is what a device was sent and has not finished, over connections of kombu's as well."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
import redis

from sutra_tasks import keys
from sutra_tasks.broker.in_flight import in_flight_of
from sutra_tasks.broker.queues import new_incarnation
from sutra_tasks.membership.reaper import reap
from tests.redis.flow import NOTHING, Worker, counted, given, load, message, numbers, send
from tests.redis.peers import Receiver, waiting

if TYPE_CHECKING:
    from kombu import Message


@pytest.fixture(autouse=True)
def _swept(_nothing_is_left_behind: None, client: redis.Redis) -> Iterator[None]:
    """What a test leaves waiting is its own business."""
    yield
    client.flushdb()


# --- over connections of kombu's -----------------------------------------------------------------

Receive = Callable[..., Receiver]


@pytest.fixture
def open_worker(open_receiver: Receive) -> Receive:
    """Open a receiver of a queue for the worker of a device, or for a router."""

    def open_one(queue: str, device: str | None = None, **options: Any) -> Receiver:
        return open_receiver(queue, in_flight=in_flight_of(new_incarnation(device)), **options)

    return open_one


def passing_on(open_worker: Receive, device: str) -> Receiver:
    """Open a router that passes everything on to one device."""

    def pass_on(message: Message) -> None:
        router.channel.forward(message, device)

    router: Receiver = open_worker(keys.EMBED_QUEUE, on_message=pass_on)
    return router


def test_what_is_passed_on_is_a_load_until_it_is_acknowledged(
    client: redis.Redis, open_worker: Receive
) -> None:
    send(client, message(0, texts=3, size=400), message(1, priority=9), message(2))
    router = passing_on(open_worker, "gpu0")
    router.drain_until(lambda: counted(client, "gpu0")["messages"] == 3)
    assert counted(client, "gpu0") == {"messages": 3, "credit": 310, "tokens": 310}
    device = open_worker(keys.device_queue("gpu0"), "gpu0")
    messages = device.take(3)
    assert device.channel.in_flight.credit_used == 310
    assert counted(client, "gpu0") == {"messages": 3, "credit": 310, "tokens": 310}
    messages[0].ack()
    messages[1].reject(requeue=False)
    device.drain_until(lambda: counted(client, "gpu0")["messages"] == 1)
    assert device.channel.in_flight.credit_used == 2
    messages[2].reject(requeue=True)
    assert counted(client, "gpu0") == NOTHING
    assert device.channel.in_flight.credit_used == 0
    router.drain_until(lambda: counted(client, "gpu0")["messages"] == 1)
    [again] = device.take(1)
    again.ack()
    device.close()
    assert counted(client, "gpu0") == NOTHING
    assert load(client, "gpu0")["tokens_completed"] == 312


def test_what_comes_past_the_router_is_in_nobodys_load(
    client: redis.Redis, open_worker: Receive
) -> None:
    queue = keys.device_queue("gpu0")
    send(client, message(0, size=40, routing_key=queue), message(1, routing_key=queue), queue=queue)
    device = open_worker(queue, "gpu0")
    messages = device.take(2)
    assert device.channel.in_flight.uncounted == (2, 14)
    assert device.channel.in_flight.credit_used == 14
    messages[0].ack()
    messages[1].reject(requeue=True)  # nor is it when a router passes it on
    router = passing_on(open_worker, "gpu0")
    router.drain_until(lambda: client.llen(queue))
    [again] = device.take(1)
    again.ack()
    device.close()
    assert device.channel.in_flight.uncounted == (0, 0)
    assert load(client, "gpu0") == {}


def test_closing_takes_off_the_load_what_is_requeued(client: redis.Redis, open_worker: Receive) -> None:
    given(client, "gpu0", [message(n) for n in range(3)])
    device = open_worker(keys.device_queue("gpu0"), "gpu0")
    device.take(3)[0].ack()
    device.close()
    assert counted(client, "gpu0") == NOTHING
    assert numbers(waiting(client, keys.EMBED_QUEUE)) == [1, 2]


def test_what_is_no_message_takes_nothing_off(client: redis.Redis, open_worker: Receive) -> None:
    given(client, "gpu0", [message(0)])
    client.lpush(keys.device_queue("gpu0"), b"not a message")
    device = open_worker(keys.device_queue("gpu0"), "gpu0")
    one, other = sorted(device.take(2), key=lambda found: found.sutra_raw == b"not a message")
    other.ack()
    device.drain_until(lambda: client.llen(device.channel.in_flight.key) == 1)
    assert counted(client, "gpu0")["messages"] == 1
    one.ack()
    device.close()
    assert counted(client, "gpu0") == NOTHING


# --- in its smallest forms -----------------------------------------------------------------------


def test_a_load_lasts_for_an_hour_from_when_it_began(client: redis.Redis) -> None:
    given(client, "gpu0", [message(0)])
    assert keys.FORGET_AFTER_S - 60 < client.ttl(keys.load("gpu0")) <= keys.FORGET_AFTER_S
    client.expire(keys.load("gpu0"), 60)
    given(client, "gpu0", [message(1)])
    assert client.ttl(keys.load("gpu0")) <= 60  # heartbeats make it last


def test_a_command_that_runs_twice_counts_once(client: redis.Redis) -> None:
    given(client, "gpu0", [message(0)])
    device = Worker(client, "gpu0")
    [raw] = device.take()
    device.acknowledge(raw)
    command = device.in_flight.take_command((), most_messages=0, most_bytes=0)
    for _ in range(2):
        client.execute_command(*command)  # type: ignore[no-untyped-call]
    assert counted(client, "gpu0") == NOTHING
    assert load(client, "gpu0")["tokens_completed"] == 2


def test_what_is_acknowledged_after_its_load_was_forgotten_begins_no_other(client: redis.Redis) -> None:
    given(client, "gpu0", [message(0), message(1)])
    device = Worker(client, "gpu0")
    done, _ = device.take()
    client.delete(keys.load("gpu0"))
    device.acknowledge(done)
    device.send_pending()
    reap(client, client, device.incarnation)
    assert load(client, "gpu0") == {}


class AcknowledgesMeanwhile(redis.Redis):
    """A client of a server that goes away, while a thread of the worker acknowledges a message."""

    def evalsha(self, *_: Any) -> Any:
        self.acknowledge()
        raise redis.ConnectionError

    def acknowledge(self) -> None:
        raise NotImplementedError


def test_what_is_acknowledged_while_it_could_not_be_requeued_leaves_the_load(
    client: redis.Redis, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given(client, "gpu0", [message(0), message(1)])
    device = Worker(client, "gpu0")
    late, lost = device.take()
    device.in_flight.consumer_gone(late)
    device.in_flight.consumer_gone(lost)
    with AcknowledgesMeanwhile.from_url(url) as away:
        monkeypatch.setattr(away, "acknowledge", lambda: device.acknowledge(late))
        with pytest.raises(redis.ConnectionError):
            device.in_flight.requeue_unclaimed(away, keys.EMBED_QUEUE)
    assert device.in_flight.requeue_unclaimed(client, keys.EMBED_QUEUE) == 1
    assert counted(client, "gpu0") == NOTHING
    assert numbers(waiting(client, keys.EMBED_QUEUE)) == numbers([lost])
