"""Laws that do not hold yet: each failing test is a product bug in its smallest form.

Those with a parameter ``stock`` hold over kombu's own transport. A mended one moves to its module.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from kombu import Connection, Consumer, Exchange, Producer, Queue

from sutra_tasks import keys
from sutra_tasks.fleet.held import HeldMessages, give_back_all
from sutra_tasks.fleet.registry import Heartbeat
from sutra_tasks.fleet.supervisor import Supervisor, WorkerSpec
from tests.conftest import wait_until
from tests.redis.peers import Receiver, waiting

Put = Callable[..., list[bytes]]
Receive = Callable[..., Receiver]


@pytest.fixture(autouse=True)
def _swept(_nothing_is_left_behind: None, client: redis.Redis) -> Iterator[None]:
    """A failing law leaves keys behind; that is not worth a second report."""
    yield
    client.flushdb()


@pytest.fixture(params=["stock", "ours"])
def either(request: pytest.FixtureRequest, held: HeldMessages) -> HeldMessages | None:
    """What a receiver holds; None makes it a stock one."""
    return held if request.param == "ours" else None


# --- bytes in a queue that are no message: give_back_all raises, and so do its callers ---


@pytest.mark.parametrize("poison", [b"not json", b"{}", b'{"properties": {}}'])
def test_what_is_no_message_does_not_keep_others_from_going_back(
    put: Put, client: redis.Redis, held: HeldMessages, poison: bytes
) -> None:
    # The worker that takes it ends; then its supervisor calls this, and ends as well.
    put("q", "text")
    client.lmove("q", held.key, "RIGHT", "LEFT")
    client.lpush(held.key, poison)
    give_back_all(client, held.incarnation)
    assert len(waiting(client, "q")) == 1


def test_the_next_connection_consumes_on_after_what_was_no_message(
    put: Put, client: redis.Redis, open_receiver: Receive, either: HeldMessages | None
) -> None:
    client.lpush("q", b"not json")
    with pytest.raises(ValueError, match="Expecting value"):
        open_receiver("q", held=either).take(1)
    put("q", "text")
    try:
        [message] = open_receiver("q", held=either).take(1)
        message.ack()
    finally:
        client.flushdb()  # closing the receivers would raise the same error again


def test_a_message_without_headers_can_be_given_back(
    put: Put, client: redis.Redis, held: HeldMessages
) -> None:
    [raw] = put("q", "text")
    client.delete("q")
    client.lpush(held.key, json.dumps({**json.loads(raw), "headers": None}))
    assert give_back_all(client, held.incarnation) == 1


# --- the routing key is taken for the queue's name: such work ends in a list nobody serves ---


def test_a_message_whose_routing_key_is_not_its_queue_comes_back(
    open_receiver: Receive, url: str, client: redis.Redis, either: HeldMessages | None
) -> None:
    # A queue bound to an exchange. gocelery, say, writes the routing key "celery" always.
    exchange = Exchange("everything", type="topic")
    queue = Queue("q", exchange, routing_key="to.*")
    receiver = open_receiver(queue, held=either)
    with Connection(url) as connection, connection.channel() as channel:
        Producer(channel, exchange).publish("text", routing_key="to.embed", declare=[queue])
    [message] = receiver.take(1)
    message.reject(requeue=True)
    assert client.lrange("to.embed", 0, -1) == []
    [message] = receiver.take(1)
    message.ack()


# --- one held list a process, but a channel reclaims and closes as if it were the only one ---


def test_another_consumer_of_the_process_leaves_held_messages_alone(
    put: Put, client: redis.Redis, open_receiver: Receive, either: HeldMessages | None
) -> None:
    put("q", *range(3))
    messages = open_receiver("q", held=either).take(3)
    open_receiver("reply", held=either)
    assert client.llen("q") == 0
    for message in messages:
        message.ack()


def test_closing_a_channel_leaves_messages_of_another_alone(
    put: Put, client: redis.Redis, open_receiver: Receive, url: str, either: HeldMessages | None
) -> None:
    # Celery reopens its remote control's channel after any error in a control command.
    put("q", *range(3))
    receiver = open_receiver("q", held=either)
    messages = receiver.take(3)
    broadcast = Exchange("everyone", type="fanout")
    heard: list[object] = []
    with receiver.connection.channel() as ear:
        queue = Queue("ear", broadcast, auto_delete=True)
        Consumer(ear, [queue], no_ack=True, on_message=heard.append).consume()
        receiver.drain_until(client.pubsub_numpat)
        with Connection(url) as connection, connection.channel() as channel:
            Producer(channel, broadcast).publish({"method": "ping"})
        receiver.drain_until(lambda: heard)
    assert waiting(client, "q") == []
    for message in messages:
        message.ack()


def test_consuming_again_on_one_channel_leaves_its_messages_alone(
    put: Put, client: redis.Redis, open_receiver: Receive, either: HeldMessages | None
) -> None:
    # Remote control's cancel_consumer and add_consumer do this to a running worker.
    put("q", *range(3))
    receiver = open_receiver("q", held=either)
    messages = receiver.take(3)
    receiver.consumer.cancel()
    receiver.consumer.consume()
    assert waiting(client, "q") == []
    for message in messages:
        message.ack()


def test_a_connection_that_is_dropped_unheard_loses_nothing(
    put: Put, client: redis.Redis, open_receiver: Receive, held: HeldMessages
) -> None:
    # kombu's health check drops a connection whose answer is 26 s overdue (a network that swallows
    # packets), and goes on with the same channel: what the server had answered stays held for good.
    put("q", "text")
    receiver = open_receiver("q", held=held)
    receiver.channel.connection.cycle.on_poll_start()  # the take is sent, its answer never read
    wait_until(lambda: client.llen(held.key) == 1)
    receiver.channel.client.connection.disconnect()
    [message] = receiver.take_all()
    assert message.payload == "text"


def test_what_was_to_be_told_over_a_dropped_connection_is_told_later(
    put: Put, client: redis.Redis, open_receiver: Receive, held: HeldMessages
) -> None:
    put("q", *range(2))
    receiver = open_receiver("q", held=held)
    finished, forwarded = receiver.take(2)
    finished.ack()
    receiver.channel.forward(forwarded, "device")
    client.client_pause(500)  # the take does not reach the server
    receiver.channel.connection.cycle.on_poll_start()
    receiver.channel.client.connection.disconnect()
    receiver.take_all()
    assert client.llen(held.key) == 0
    assert client.llen("device") == 1


# --- deliveries without an acknowledgement, or without a take ---


def test_a_consumer_that_does_not_acknowledge_leaves_nothing_behind(
    put: Put, client: redis.Redis, open_receiver: Receive, either: HeldMessages | None
) -> None:
    # Celery reads replies of remote control so: mingle (on by default), and inspect in a worker.
    put("reply", "text")
    receiver = open_receiver("reply", held=either, no_ack=True)
    receiver.take(1)
    receiver.close()
    assert client.keys() == []


def test_a_message_asked_for_can_be_acknowledged(
    put: Put, client: redis.Redis, open_receiver: Receive, either: HeldMessages | None
) -> None:
    put("q", "text")
    receiver = open_receiver("unused", held=either)
    receiver.channel.basic_get("q").ack()
    assert receiver.take_all() == []
    assert client.keys() == []


# --- elsewhere ---


class SometimesAway(redis.Redis):
    """A client whose server can go away."""

    away = False

    def execute_command(self, *args: Any, **options: Any) -> Any:
        if self.away:
            raise redis.ConnectionError("away")
        return super().execute_command(*args, **options)  # type: ignore[no-untyped-call]


def test_what_a_process_held_goes_back_even_if_the_server_was_away_when_it_died(
    put: Put, client: redis.Redis, url: str
) -> None:
    with SometimesAway.from_url(url) as own:
        specs = [WorkerSpec("router", ["sleep", "60"], {})]
        supervisor = Supervisor(specs, own, drain_s=1.0, report=lambda _: None)
        supervisor.start(0.0)
        try:
            [child] = supervisor._children
            process, held = child.process, keys.held(child.incarnation)
            assert process is not None
            put("q", "text")
            client.lmove("q", held, "RIGHT", "LEFT")
            own.away = True
            process.kill()
            wait_until(lambda: process.poll() is not None)
            supervisor.step(1.0)
            own.away = False
            for now in range(2, 10):
                supervisor.step(float(now))
        finally:
            supervisor.stop()
    assert client.llen(held) == 0
    assert len(waiting(client, "q")) == 1


def test_a_heartbeat_that_never_began_can_be_stopped(client: redis.Redis) -> None:
    # A device worker stopped before it reached its broker; its batcher is then not drained.
    def describe() -> Any:
        raise AssertionError

    Heartbeat(client, describe, 1.0).stop()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"v": 1, "shape": [2, 2], "data": "AAAA"}, "CorruptResultError"),
        ({"v": 2, "shape": [1], "data": "AAAAAA=="}, "UnsupportedVersionError"),
    ],
)
def test_vectors_that_do_not_decode_are_refused_by_name(
    get: Callable[..., dict[str, Any]], client: redis.Redis, value: object, expected: str
) -> None:
    # kombu wraps what a decoder raises, so callers see kombu.exceptions.DecodeError.
    vectors = {"__type__": "sutra.vectors", "__value__": value}
    stored = {"status": "SUCCESS", "result": vectors, "task_id": "c", "children": []}
    client.set("celery-task-meta-c", json.dumps(stored), ex=60)
    assert get("c")["c"]["type"] == f"sutra_tasks.errors.{expected}"
