"""One process's view of the fleet: a snapshot that is at most 100 ms old."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from sutra_tasks.membership.fleet import fleet_members
from sutra_tasks.routing.snapshot import Fleet, fleet_of

if TYPE_CHECKING:
    from collections.abc import Callable

    import redis

    from sutra_tasks.routing.snapshot import Device

__all__ = ["FleetView"]

SNAPSHOT_AGE_S: Final = 0.1


class FleetView:
    """Reads the fleet when it is asked and the last snapshot is old; counts what was sent since then.

    A router asks on Celery's event loop, and waits there for the server's answer. A thread would gain
    nothing: all else that the loop does is to exchange messages with the same server. And messages that
    are forwarded while a thread reads would be missing in the snapshot that it brings.
    """

    def __init__(
        self, client: redis.Redis, ttl_s: float, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Begin with an empty snapshot, which is old.

        Args:
            client: the broker.
            ttl_s: seconds since its last heartbeat for which a device is live.
            clock: monotonic seconds.
        """
        self._client, self._ttl_s, self._clock = client, ttl_s, clock
        self.latest = Fleet()
        self._read_at = -float("inf")
        self._no_device_since: float | None = None

    @property
    def outage_s(self) -> float:
        """Seconds since the first of the snapshots without a live device; 0 if the latest has one."""
        return 0.0 if self._no_device_since is None else self._clock() - self._no_device_since

    def read(self) -> Fleet:
        """Return the latest snapshot, or a new one if that is old.

        Raises:
            redis.RedisError: the server did not answer; the next call asks again.
        """
        now = self._clock()
        if now - self._read_at >= SNAPSHOT_AGE_S:
            self.latest = fleet_of(fleet_members(self._client), self._ttl_s)
            self._read_at = now
            if self.latest.devices:
                self._no_device_since = None
            elif self._no_device_since is None:
                self._no_device_since = now
        return self.latest

    def count_sent(self, device: Device, tokens: int) -> None:
        """Count a message in the latest snapshot."""
        self.latest = self.latest.after_sending(device, tokens)

    def clear(self) -> None:
        """Take the fleet as empty until the snapshot is old: the server is not asked before."""
        self.latest, self._read_at = Fleet(), self._clock()
