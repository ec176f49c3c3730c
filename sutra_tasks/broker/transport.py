"""kombu's Redis transport for workers. Clients have their own, and any stock Celery client can send."""

from __future__ import annotations

from typing import Any

from kombu.transport import redis as stock

from sutra_tasks.broker.channel import Channel
from sutra_tasks.broker.deliveries import TAKEN
from sutra_tasks.broker.queues import requeue_target
from sutra_tasks.client import transport

__all__ = ["Transport"]


class Poller(stock.MultiChannelPoller):  # type: ignore[misc]  # kombu is half typed
    """kombu's poller, without a system call for each socket at each turn of the loop."""

    # Kept here: kombu forgets its current loop when Celery resets it, at the first lost connection.
    loop: Any = None

    @property
    def fds(self) -> dict[int, Any]:
        """The sockets that the event loop does not listen to yet; without a loop, all of them."""
        found: dict[int, Any] = super().fds
        loop = self.loop
        return found if loop is None else {fd: c for fd, c in found.items() if fd not in loop.readers}


class Transport(transport.Transport):
    """The transport of worker processes: ``broker_transport`` in their settings."""

    Channel = Channel

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cycle = Poller()

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        """Serve a connection from ``loop``."""
        self.cycle.loop = loop
        super().register_with_event_loop(connection, loop)

    def _reject_inbound_message(self, raw_message: dict[str, Any]) -> None:
        # A message of a queue whose consumer was just cancelled: it is in flight, so it is requeued.
        for channel in self.channels:
            if channel and channel.in_flight is not None and TAKEN in raw_message:
                raw, queue, _ = raw_message[TAKEN]
                channel.in_flight.requeue(channel.scripts, raw, requeue_target(queue))
                return
        super()._reject_inbound_message(raw_message)
