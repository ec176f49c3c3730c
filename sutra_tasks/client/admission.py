"""Admission: a call is refused before it is sent if more work waits than the fleet can do in time.

Routers publish the fleet's backlog once a second. A client reads it at most twice a second, and adds the
tokens that it has sent since.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import redis

from sutra_tasks import keys
from sutra_tasks.connections import abandon, broker_client
from sutra_tasks.errors import FleetSaturated

if TYPE_CHECKING:
    from sutra_tasks.settings import Settings

__all__ = ["Admission", "Backlog", "excess_s"]

VERSION: Final = 1
READ_EVERY_S: Final = 0.5
TIMEOUT_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Backlog:
    """The work that waits in the whole fleet.

    Attributes:
        tokens: estimated tokens of all messages that wait.
        tokens_per_s: estimated tokens that all devices together compute in a second; 0: not known.
    """

    tokens: int
    tokens_per_s: float

    def to_json(self) -> str:
        """Return the JSON that is stored under ``keys.backlog()``."""
        return json.dumps({"v": VERSION, **asdict(self)})

    @classmethod
    def from_json(cls, text: bytes | str | None) -> Backlog | None:
        """Read what :meth:`to_json` returned; None if it is missing or of another version."""
        value: Any = json.loads(text) if text is not None else None
        if value is None or value.get("v") != VERSION:
            return None
        return cls(value["tokens"], value["tokens_per_s"])


def excess_s(tokens: int, tokens_per_s: float, max_queue_s: float) -> float:
    """Return how many seconds of work ``tokens`` are over the limit; 0 or less: they may wait.

    Args:
        tokens: that wait.
        tokens_per_s: of the fleet; 0: not known, so nothing is over the limit.
        max_queue_s: the limit; 0: there is none.
    """
    return tokens / tokens_per_s - max_queue_s if tokens_per_s > 0 and max_queue_s > 0 else 0.0


class Admission:
    """The backlog as one client process knows it."""

    def __init__(self, options: Settings, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_queue_s, self._clock = options.max_queue_s, clock
        self._client = broker_client(options, timeout_s=TIMEOUT_S, retries=False)
        self._read_at = -float("inf")
        self._backlog: Backlog | None = None
        self._sent = 0

    def admit(self, tokens: int) -> None:
        """Count ``tokens`` as sent, or refuse them.

        Raises:
            FleetSaturated: more work waits than the fleet can do in ``SUTRA_MAX_QUEUE_S``.
        """
        if not self._max_queue_s:
            return
        if self._clock() - self._read_at >= READ_EVERY_S:
            self._read()
        if self._backlog is None:
            return  # no router is up, or the server is away: the call waits, or fails, when it is sent
        waiting = self._backlog.tokens + self._sent
        excess = excess_s(waiting, self._backlog.tokens_per_s, self._max_queue_s)
        if excess > 0:
            raise FleetSaturated(waiting, round(excess, 1))
        self._sent += tokens

    def abandon(self) -> None:
        """Close, in a forked child, the connections of the parent; it makes an admission of its own."""
        abandon(self._client.connection_pool)

    def _read(self) -> None:
        self._read_at = self._clock()
        self._sent = 0
        try:
            self._backlog = Backlog.from_json(self._client.get(keys.backlog()))
        except (redis.RedisError, OSError):
            self._backlog = None  # sending fails as well, and its error tells why
