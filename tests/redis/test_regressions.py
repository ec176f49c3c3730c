"""Bugs that were, each in its smallest form.

Those with a parameter ``stock`` always passed over kombu's own transport.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
import redis

from sutra_tasks import keys
from sutra_tasks.broker.in_flight import TAKE
from tests.conftest import wait_until
from tests.redis.peers import Receiver, absent_server, waiting

if TYPE_CHECKING:
    from sutra_tasks.broker.in_flight import InFlightMessages

Put = Callable[..., list[bytes]]
Receive = Callable[..., Receiver]


@pytest.fixture(autouse=True)
def _swept(_nothing_is_left_behind: None, client: redis.Redis) -> Iterator[None]:
    """A failing law leaves keys behind; that is not worth a second report."""
    yield
    client.flushdb()


@pytest.fixture(params=["stock", "ours"])
def either(request: pytest.FixtureRequest, in_flight: InFlightMessages) -> InFlightMessages | None:
    """What a receiver has in flight; None makes it a stock one."""
    return in_flight if request.param == "ours" else None


# --- a connection that is dropped without an error -----------------------------------------------
#
# kombu's health check (and its handling of an idle socket that closed) disconnects and goes on with
# the same channel: no error, no new consumer, nothing requeued. It does so after 26 s without an answer.


def test_what_was_taken_over_a_connection_dropped_unheard_is_delivered_later(
    put: Put, client: redis.Redis, open_receiver: Receive, in_flight: InFlightMessages
) -> None:
    put("q", "text")
    receiver = open_receiver("q", in_flight=in_flight)
    client.script_load(TAKE.text)  # a server without it would refuse the take
    receiver.channel.connection.cycle.on_poll_start()  # the take is sent, its answer never read
    wait_until(lambda: client.llen(in_flight.key) == 1)
    receiver.channel.client.connection.disconnect()
    [message] = receiver.take_all()
    assert message.payload == "text"


def test_what_was_pending_over_a_dropped_connection_is_sent_later(
    put: Put, client: redis.Redis, open_receiver: Receive, in_flight: InFlightMessages
) -> None:
    put("q", *range(2))
    receiver = open_receiver("q", in_flight=in_flight)
    finished, forwarded = receiver.take(2)
    finished.ack()
    receiver.channel.forward(forwarded, "gpu0")
    client.client_pause(500)  # the take does not reach the server
    receiver.channel.connection.cycle.on_poll_start()
    receiver.channel.client.connection.disconnect()
    receiver.take_all()
    assert client.llen(in_flight.key) == 0
    assert client.llen(keys.device_queue("gpu0")) == 1


def test_what_was_acknowledged_is_not_repeated_if_sending_failed(
    put: Put, client: redis.Redis, open_receiver: Receive, in_flight: InFlightMessages
) -> None:
    put("q", *range(2))
    lost = open_receiver("q", in_flight=in_flight)
    lost.take(2)[0].ack()
    lost.channel.client.connection._sock.shutdown(socket.SHUT_RDWR)
    with pytest.raises(redis.ConnectionError):
        lost.take(1)
    lost.connection.collect()
    messages = open_receiver("q", in_flight=in_flight).take_all()
    assert [message.payload for message in messages] == [1]


# --- one queue for everything a process has in flight ---------------------------------------------


def test_closing_requeues_each_message_to_its_own_queue(
    put: Put, client: redis.Redis, open_receiver: Receive, either: InFlightMessages | None
) -> None:
    put("a", "a")
    put("b", "b")
    receiver = open_receiver("a", "b", in_flight=either)
    receiver.take(2)
    receiver.close()
    assert [len(waiting(client, queue)) for queue in ("a", "b")] == [1, 1]


def test_work_of_a_lost_connection_does_not_go_to_the_queue_that_is_consumed_first(
    put: Put, client: redis.Redis, open_receiver: Receive, in_flight: InFlightMessages
) -> None:
    # Mingle, Celery's default, consumes a queue for replies before a worker's own, on reconnecting.
    put("q", *range(3))
    lost = open_receiver("q", in_flight=in_flight)
    lost.take(3)
    lost.channel.__dict__["_commands"] = absent_server()  # the server is away
    lost.close()
    open_receiver("reply", in_flight=in_flight)
    assert waiting(client, "reply") == []
    assert len(open_receiver("q", in_flight=in_flight).take_all()) == 3


def test_a_message_asked_for_goes_back_on_closing(
    put: Put, client: redis.Redis, open_receiver: Receive, either: InFlightMessages | None
) -> None:
    put("q", "text")
    receiver = open_receiver("unused", in_flight=either)
    receiver.channel.basic_get("q")
    receiver.close()
    assert len(waiting(client, "q")) == 1


# --- elsewhere -----------------------------------------------------------------------------------


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
