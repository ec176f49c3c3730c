"""Laws that do not hold yet: each failing test is a product bug in its smallest form.

Those with a parameter ``stock`` hold over kombu's own transport. A mended one moves to its module.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
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


@pytest.fixture(params=["stock", "ours"])
def maybe_held(request: pytest.FixtureRequest, held: HeldMessages) -> HeldMessages | None:
    """What a receiver holds; None makes it a stock one."""
    return held if request.param == "ours" else None


@pytest.mark.parametrize("poison", [b"not json", b"{}", b'{"properties": {}}'])
def test_what_is_no_message_does_not_keep_the_others_from_going_back(
    put: Put,
    client: redis.Redis,
    held: HeldMessages,
    leaves: set[str],
    poison: bytes,
):
    # Such bytes in a queue end the worker that takes them; then its supervisor calls this.
    for raw in put("q", 0, 1):
        client.lmove("q", held.key, "RIGHT", "LEFT")
        client.lpush(held.key, poison)
        assert raw
    leaves.add("q")
    try:
        give_back_all(client, held.incarnation)
    finally:
        returned = waiting(client, "q")
        client.delete(held.key)
        leaves.intersection_update({"q"} if returned else set())
    assert len(returned) == 2


def test_a_worker_consumes_on_after_bytes_that_are_no_message(
    put: Put, client: redis.Redis, open_receiver: Receive, maybe_held: HeldMessages | None
):
    client.lpush("q", b"not json")
    with pytest.raises(ValueError, match="Expecting value"):
        open_receiver("q", held=maybe_held).take(1)
    put("q", "text")
    try:
        [message] = open_receiver("q", held=maybe_held).take(1)  # the next connection
    finally:
        if maybe_held is not None:
            client.delete(maybe_held.key, "q")
    assert message.payload == "text"
    message.ack()


def test_a_message_without_headers_can_be_given_back(
    put: Put, client: redis.Redis, held: HeldMessages
):
    [raw] = put("q", "text")
    client.delete("q")
    client.lpush(held.key, json.dumps({**json.loads(raw), "headers": None}))
    try:
        assert give_back_all(client, held.incarnation) == 1
    finally:
        client.flushdb()


def test_a_message_whose_routing_key_is_not_its_queue_comes_back(
    open_receiver: Receive, url: str, client: redis.Redis, maybe_held: HeldMessages | None
):
    # A queue bound to an exchange; clients of other languages also write a constant routing key.
    exchange = Exchange("everything", type="topic")
    queue = Queue("q", exchange, routing_key="to.*")
    receiver = open_receiver(queue, held=maybe_held)
    with Connection(url) as connection, connection.channel() as channel:
        Producer(channel, exchange).publish("text", routing_key="to.embed", declare=[queue])
    [message] = receiver.take(1)
    message.reject(requeue=True)
    astray = client.lrange("to.embed", 0, -1)
    client.delete("to.embed")
    assert astray == []
    [message] = receiver.take(1)
    message.ack()


def test_a_consumer_that_does_not_acknowledge_leaves_nothing_behind(
    put: Put, client: redis.Redis, open_receiver: Receive, maybe_held: HeldMessages | None
):
    # Celery reads replies of remote control so: mingle (on by default), and inspect in a worker.
    put("reply", "text")
    receiver = open_receiver("reply", held=maybe_held, no_ack=True)
    receiver.take(1)
    receiver.close()
    left = client.keys()
    client.flushdb()
    assert left == []


def test_another_consumer_of_the_process_leaves_held_messages_alone(
    put: Put, client: redis.Redis, open_receiver: Receive, maybe_held: HeldMessages | None
):
    put("q", *range(3))
    messages = open_receiver("q", held=maybe_held).take(3)
    open_receiver("reply", held=maybe_held)
    returned = client.lrange("q", 0, -1)
    client.delete("q")
    assert returned == []
    for message in messages:
        message.ack()


def test_closing_a_channel_leaves_messages_of_another_alone(
    put: Put,
    client: redis.Redis,
    open_receiver: Receive,
    url: str,
    maybe_held: HeldMessages | None,
):
    # Celery closes and reopens its remote control's channel after any error in a control command.
    put("q", *range(3))
    receiver = open_receiver("q", held=maybe_held)
    messages = receiver.take(3)
    broadcast, heard = Exchange("everyone", type="fanout"), list[Any]()
    with receiver.connection.channel() as ear:
        queue = Queue("ear", broadcast, auto_delete=True)
        Consumer(ear, [queue], no_ack=True, on_message=heard.append).consume()
        receiver.drain_until(client.pubsub_numpat)
        with Connection(url) as connection, connection.channel() as channel:
            Producer(channel, broadcast).publish({"method": "ping"})
        receiver.drain_until(lambda: heard)
    returned = client.lrange("q", 0, -1)
    client.delete("q")
    assert returned == []
    for message in messages:
        message.ack()


def test_consuming_again_on_one_channel_leaves_its_messages_alone(
    put: Put, client: redis.Redis, open_receiver: Receive, maybe_held: HeldMessages | None
):
    # Remote control's cancel_consumer and add_consumer do this to a running worker.
    put("q", *range(3))
    receiver = open_receiver("q", held=maybe_held)
    messages = receiver.take(3)
    receiver.consumer.cancel()
    receiver.consumer.consume()
    returned = client.lrange("q", 0, -1)
    client.delete("q")
    assert returned == []
    for message in messages:
        message.ack()


def test_a_message_asked_for_can_be_acknowledged(
    put: Put, client: redis.Redis, open_receiver: Receive, maybe_held: HeldMessages | None
):
    put("q", "text")
    message = open_receiver("unused", held=maybe_held).channel.basic_get("q")
    message.ack()
    assert client.keys() == []


def test_a_heartbeat_that_never_began_can_be_stopped(client: redis.Redis):
    # A device worker stopped before it reached its broker; its batcher is then not drained.
    def describe() -> Any:
        raise AssertionError

    Heartbeat(client, describe, 1.0).stop()


class SometimesAway(redis.Redis):
    """A client whose server can go away."""

    away = False

    def execute_command(self, *args: Any, **options: Any) -> Any:
        if self.away:
            raise redis.ConnectionError("away")
        return super().execute_command(*args, **options)


def test_what_a_process_held_goes_back_even_if_the_server_was_away_when_it_died(
    put: Put, client: redis.Redis, url: str, leaves: set[str]
):
    with SometimesAway.from_url(url) as own:
        supervisor = Supervisor(
            [WorkerSpec("router", ["sleep", "60"], {})], own, drain_s=1.0, report=lambda _: None
        )
        supervisor.start(0.0)
        try:
            [child] = supervisor._children
            assert child.process is not None
            put("q", "text")
            key = keys.held(child.incarnation)
            client.lmove("q", key, "RIGHT", "LEFT")
            own.away = True
            child.process.send_signal(signal.SIGKILL)
            wait_until(lambda: child.process is None or child.process.poll() is not None)
            supervisor.step(1.0)
            own.away = False
            for now in range(2, 10):
                supervisor.step(float(now))
        finally:
            supervisor.stop()
    left = client.lrange(key, 0, -1)
    client.delete(key, "q")
    assert left == []


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"v": 1, "shape": [2, 2], "data": "AAAA"}, "CorruptResultError"),
        ({"v": 2, "shape": [1], "data": "AAAAAA=="}, "UnsupportedVersionError"),
    ],
)
def test_vectors_that_do_not_decode_are_refused_by_name(
    get: Callable[..., dict[str, Any]], client: redis.Redis, value: dict[str, Any], expected: str
):
    vectors = {"__type__": "sutra.vectors", "__value__": value}
    stored = {"status": "SUCCESS", "result": vectors, "task_id": "c", "children": []}
    client.set("celery-task-meta-c", json.dumps(stored), ex=60)
    assert get("c")["c"]["type"] == f"sutra_tasks.errors.{expected}"
