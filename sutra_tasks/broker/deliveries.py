"""Messages that were delivered over one channel, for kombu: acknowledged or rejected by their tags."""

from __future__ import annotations

from typing import Any, Final

from kombu.transport import redis as stock
from kombu.transport import virtual

__all__ = ["TAKEN", "Message", "QoS"]

TAKEN: Final = "sutra_taken"
"""Field of a parsed message on its way through kombu: its bytes, its queue and its weight."""

DECODED: Final = "sutra_decoded"
"""Field of a parsed message on its way through kombu: what its body says, if the body is decoded."""


class Message(virtual.Message):  # type: ignore[misc]  # kombu is half typed
    """A delivery that has the bytes it was taken as, which name it in the in-flight list.

    Attributes:
        sutra_raw: the bytes; None if it was not taken into the in-flight list.
        sutra_queue: the queue it was taken from.
        sutra_weight: tokens it adds to its device's load.
        sutra_failed: set it before requeuing, to count an attempt.
    """

    def __init__(self, payload: dict[str, Any], channel: Any = None, **kwargs: Any) -> None:
        self.sutra_raw, self.sutra_queue, self.sutra_weight = payload.pop(TAKEN, (None, None, 0))
        self.sutra_failed = False
        decoded = payload.pop(DECODED, None)
        super().__init__(payload, channel=channel, **kwargs)
        if decoded is not None:
            self._decoded_cache = decoded


class QoS(stock.QoS):  # type: ignore[misc]  # kombu is half typed
    """Messages delivered over one channel; on the server, they are in flight."""

    def append(self, message: Any, delivery_tag: str) -> None:
        """Remember a delivery; taking it has already recorded it on the server."""
        virtual.QoS.append(self, message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        """Acknowledge a message; from any thread. Ignored if its connection was lost: it is requeued."""
        message = self._delivered.get(delivery_tag)
        if message is not None:
            # In this order: acknowledging wakes the loop, which must see that it may take one more.
            virtual.QoS.ack(self, delivery_tag)
            self.channel.acknowledge(message)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Requeue a message, or drop it; from any thread."""
        message = self._delivered.get(delivery_tag)
        if message is not None and requeue:
            self.channel.requeue(message)
            virtual.QoS.ack(self, delivery_tag)
            self.channel.wake()
        else:
            self.ack(delivery_tag)

    def restore_visible(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: messages are requeued when a worker dies, not after a time."""

    def restore_unacked_once(self, stderr: Any = None) -> None:  # noqa: ARG002 - kombu's signature
        """Requeue what is not acknowledged, now or on reconnecting."""
        self._on_collect.cancel()
        self._flush()
        if self._delivered.restored:
            return
        self._delivered.restored = True
        self.channel.requeue_all(list(self._delivered.values()))
        self._delivered.clear()
