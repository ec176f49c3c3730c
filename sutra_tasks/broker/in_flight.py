"""The messages that a worker process has in flight: taken and not acknowledged.

Taking a message moves it from its queue to the process's in-flight list in one step, so no message is
lost with a process that is killed. The list is named by incarnation (device and start), not by device:
a worker that starts again must not mistake its predecessor's messages for its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from sutra_tasks import keys, lua
from sutra_tasks.broker.load import LOAD_CONSTANTS, MOST_CREDIT, load_key
from sutra_tasks.broker.queues import device_of, lane
from sutra_tasks.broker.requeue import requeue, requeue_in_flight

if TYPE_CHECKING:
    from collections.abc import Sequence

    import redis

__all__ = ["InFlightMessages", "in_flight_of"]

TAKE: Final = lua.script("broker/take", **LOAD_CONSTANTS)


@cache
def in_flight_of(incarnation: str) -> InFlightMessages:
    """Return this process's one object for the messages that ``incarnation`` has in flight."""
    return InFlightMessages(incarnation)


@dataclass(frozen=True, slots=True)
class _Delivery:
    """A message that was delivered to a consumer of this process.

    Attributes:
        queue: where it is requeued to.
        tokens: its estimated tokens.
        weight: tokens that it counts in the load of this process's device.
    """

    queue: str
    tokens: int
    weight: int


_UNKNOWN: Final = _Delivery("", 0, 0)


@dataclass(frozen=True, slots=True, repr=False)
class _Pending:
    """An acknowledged or forwarded message of which the server has not heard yet.

    Attributes:
        message: its bytes, as it was taken.
        weight: tokens it leaves in the load of this process's device, or adds to that of its new one.
        target: the list it is forwarded to; empty if it was acknowledged.
        target_load: the load of the device it is forwarded to.
    """

    message: bytes
    weight: int
    target: str = ""
    target_load: str = ""


class InFlightMessages:
    """The messages one process has in flight; its channels come and go with their connections.

    Acknowledging and forwarding are noted here and sent with the next take. A note that was sent stays
    until the server answers, and is sent again if no answer comes; the script moves each message once.
    A worker that is killed in between leaves acknowledged messages in flight, to be requeued.

    Safe to use from many threads, but for :meth:`take_command`, :meth:`take_answered`,
    :meth:`take_lost` and :meth:`requeue_unclaimed`, which belong to the thread that takes.
    """

    def __init__(self, incarnation: str) -> None:
        self.incarnation = incarnation
        self.key = keys.in_flight(incarnation)
        self.may_take: Callable[[str], bool] = lambda _: True
        """Asked before each take whether this process can have more messages of a queue."""
        self._load = load_key(incarnation)
        self._has_load = device_of(incarnation) is not None
        self._delivered: dict[bytes, _Delivery] = {}
        self._unclaimed: dict[bytes, _Delivery] = {}
        self._pending: deque[_Pending] = deque()
        self._sent: list[_Pending] = []

    @property
    def has_pending(self) -> bool:
        """Whether an acknowledged or forwarded message waits to be sent to the server."""
        return bool(self._pending)

    @property
    def credit_used(self) -> int:
        """Tokens of credit that the messages at this process's consumers use."""
        return sum(min(one.tokens, MOST_CREDIT) for one in list(self._delivered.values()))

    @property
    def uncounted(self) -> tuple[int, int]:
        """Messages at consumers, and their tokens, that no router forwarded and no load counts."""
        tokens = [one.tokens for one in list(self._delivered.values()) if not one.weight]
        return len(tokens), sum(tokens)

    def delivered(self, raw: bytes, queue: str, *, tokens: int = 0, weight: int = 0) -> None:
        """Note that a consumer of this process has a message.

        Args:
            raw: the message, as it was taken.
            queue: where it is requeued to.
            tokens: its estimated tokens.
            weight: the tokens that its device's load counts for it.
        """
        self._delivered[raw] = _Delivery(queue, tokens, weight if self._has_load else 0)

    def acknowledge(self, raw: bytes) -> None:
        """Note that a message is done; the next take removes it from the list."""
        found = self._delivered.pop(raw, None) or self._unclaimed.pop(raw, None) or _UNKNOWN
        self._pending.append(_Pending(raw, found.weight))

    def forward(self, raw: bytes, device_id: str, priority: int, *, weight: int) -> None:
        """Note that a message goes to a device, byte for byte; the next take moves it.

        Args:
            raw: the message, as it was taken.
            device_id: the device.
            priority: the message's priority.
            weight: tokens that it adds to the device's load.
        """
        self._delivered.pop(raw, None)
        target = lane(keys.device_queue(device_id), priority)
        self._pending.append(_Pending(raw, weight, target, keys.load(device_id)))

    def consumer_gone(self, raw: bytes) -> None:
        """Note that the consumer of a message is gone: :meth:`requeue_unclaimed` will requeue it."""
        if found := self._delivered.pop(raw, None):
            self._unclaimed[raw] = found

    def take_command(
        self,
        sources: Sequence[str],
        *,
        most_messages: int,
        most_bytes: int,
        with_text: bool = False,
    ) -> tuple[Any, ...]:
        """Return the command that sends what is pending and takes from lists.

        Call :meth:`take_answered` or :meth:`take_lost` before the next one.

        Args:
            sources: lists to take from, the first served first; none to take nothing.
            most_messages: messages to take at most.
            most_bytes: bytes after which no more is taken.
            with_text: send the whole script, for a server that does not have it.
        """
        values = self._take_values(sources, most_messages, most_bytes)
        return TAKE.command_with_text(**values) if with_text else TAKE.command(**values)

    def take_answered(self) -> None:
        """Forget what the last take sent: the server has done it."""
        self._sent = []

    def take_lost(self) -> None:
        """Have the next take send again what the last one sent: no answer came."""
        self._pending.extendleft(reversed(self._sent))
        self._sent = []

    def requeue(self, client: redis.Redis, raw: bytes, queue: str, *, failed: bool = False) -> None:
        """Requeue one message now.

        Args:
            client: the server with the queues.
            raw: the message, as it was taken.
            queue: where it goes.
            failed: whether this counts as an attempt.

        Raises:
            redis.RedisError: the server did not do it; :meth:`requeue_unclaimed` will.
        """
        found = self._delivered.pop(raw, _UNKNOWN)
        try:
            requeue(client, self.incarnation, raw, queue, failed=failed)
        except BaseException:
            self._unclaimed[raw] = replace(found, queue=queue)
            raise

    def requeue_unclaimed(self, client: redis.Redis, queue: str) -> int:
        """Requeue what no consumer of this process has, and return how many messages moved.

        Runs when a connection ends, and again when the next one begins, because the server may have been
        away. If a thread still computes such a message, it is computed twice, to the same vectors.

        Args:
            client: the server with the queues.
            queue: where messages go that were taken and never delivered, because the answer was lost.

        Raises:
            redis.RedisError: the server did not do all of it; the next call will.
        """
        self.take_lost()
        if self._pending:
            try:
                TAKE(client, **self._take_values((), 0, 0))
            except BaseException:
                self.take_lost()
                raise
            self.take_answered()
        queues = {raw: found.queue for raw, found in list(self._unclaimed.items())}
        moved = requeue_in_flight(client, self.incarnation, queue, queues=queues, keep=self._delivered)
        for raw in queues:  # only now: until then a thread may still acknowledge it
            self._unclaimed.pop(raw, None)
        return moved

    def _take_values(
        self, sources: Sequence[str], most_messages: int, most_bytes: int
    ) -> dict[str, Any]:
        """Return what the script takes, and note that everything pending is on its way."""
        self._sent = [self._pending.popleft() for _ in range(len(self._pending))]
        acknowledged = [one for one in self._sent if not one.target]
        forwarded = [one for one in self._sent if one.target]
        return {
            "in_flight": self.key,
            "load": self._load,
            "targets": [one.target for one in forwarded],
            "target_loads": [one.target_load for one in forwarded],
            "sources": sources,
            "most_messages": most_messages,
            "most_bytes": most_bytes,
            "acknowledged": [one.message for one in acknowledged],
            "acknowledged_weights": [one.weight for one in acknowledged],
            "forwarded": [one.message for one in forwarded],
            "forwarded_weights": [one.weight for one in forwarded],
        }
