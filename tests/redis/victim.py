"""A process to be killed: it consumes ``queue`` over our transport.

``python -m tests.redis.victim <url> <incarnation> <queue> <keep|finish> <idle wait in seconds>``
keeps every message unacknowledged, or acknowledges each after noting its body in the list ``done``.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import redis

from sutra_tasks.broker import take_protocol
from sutra_tasks.broker.in_flight import in_flight_of
from tests.redis.peers import Receiver

if TYPE_CHECKING:
    from kombu import Message


def main(url: str, incarnation: str, queue: str, mode: str, idle_wait_s: str) -> None:
    take_protocol.IDLE_WAIT_S = float(idle_wait_s)  # type: ignore[misc]  # long enough to be stopped in
    client = redis.Redis.from_url(url)

    def finish(message: Message) -> None:
        client.rpush("done", message.payload)
        message.ack()

    receiver = Receiver(
        url,
        queue,
        in_flight=in_flight_of(incarnation),
        on_message=finish if mode == "finish" else None,
    )
    while True:
        receiver.connection.drain_events()


if __name__ == "__main__":
    main(*sys.argv[1:])
