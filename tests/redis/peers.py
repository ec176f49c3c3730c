"""Both ends of a queue: a stock sender, and a receiver over either transport."""

from __future__ import annotations

import socket
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import redis
from kombu import Connection, Consumer, Producer, Queue
from redis.backoff import NoBackoff
from redis.retry import Retry

from sutra_tasks.broker.queues import lanes
from sutra_tasks.host.embedded_server import free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kombu import Message

    from sutra_tasks.broker.in_flight import InFlightMessages

OURS = "sutra_tasks.broker.transport:Transport"
QUIET_S = 0.3
"""How long nothing must arrive to say that nothing will: three waits of an idle worker."""


def send(url: str, queue: str, *bodies: Any, **options: Any) -> list[bytes]:
    """Publish with a stock client; return the stored messages, oldest first, of that queue."""
    with Connection(url) as connection, connection.channel() as channel:
        producer = Producer(channel)
        for body in bodies:
            producer.publish(body, routing_key=queue, **options)
    with redis.Redis.from_url(url) as client:
        return waiting(client, queue)


def waiting(client: redis.Redis, queue: str) -> list[bytes]:
    """Return the messages of a queue in the order they would be taken."""
    found: list[bytes] = []
    for name in lanes(queue):
        newest_first: Any = client.lrange(name, 0, -1)
        found += reversed(newest_first)
    return found


def absent_server() -> redis.Redis:
    """Return a client of a server that is not there; it does not try twice."""
    return redis.Redis(port=free_port(), socket_timeout=1.0, retry=Retry(NoBackoff(), 0))


@contextmanager
def full_memory(client: redis.Redis) -> Iterator[None]:
    """Let the server refuse whatever needs memory."""
    client.config_set("maxmemory", "1")
    try:
        yield
    finally:
        client.config_set("maxmemory", "0")


class Receiver:
    """A consumer of ``queues`` that keeps what is delivered; over our transport with ``in_flight``."""

    def __init__(
        self,
        url: str | Connection,
        *queues: str | Queue,
        in_flight: InFlightMessages | None = None,
        prefetch: int = 0,
        no_ack: bool = False,
        on_message: Callable[[Message], None] | None = None,
    ) -> None:
        options: dict[str, Any] = {}
        if in_flight is not None:
            named = {"incarnation": in_flight.incarnation}
            options = {"transport": OURS, "transport_options": named}
        self.messages: list[Message] = []
        self.connection = Connection(url, **options) if isinstance(url, str) else url
        self.channel = self.connection.channel()
        self.channel.basic_qos(0, prefetch, False)
        self.consumer = Consumer(
            self.channel,
            [Queue(queue) if isinstance(queue, str) else queue for queue in queues],
            on_message=on_message or self.messages.append,
            no_ack=no_ack,
        )
        self.consumer.consume()

    def drain_until(self, condition: Callable[[], object], within_s: float = 10.0) -> None:
        """Receive until ``condition()`` is true."""
        deadline = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < deadline, f"not true within {within_s} s"
            with suppress(socket.timeout):
                self.connection.drain_events(timeout=0.1)

    def take(self, count: int) -> list[Message]:
        """Receive until ``count`` messages have arrived; return them and forget them."""
        self.drain_until(lambda: len(self.messages) >= count)
        taken, self.messages[:] = self.messages[:count], self.messages[count:]
        return taken

    def take_all(self) -> list[Message]:
        """Receive until nothing more arrives; return everything and forget it."""
        with suppress(socket.timeout):
            while True:
                self.connection.drain_events(timeout=QUIET_S)
        taken, self.messages[:] = list(self.messages), []
        return taken

    def close(self) -> None:
        """Close the connection; closing twice changes nothing."""
        self.connection.close()
        self.channel._disconnect_pools()  # kombu's own connects anew, to give back what it holds
