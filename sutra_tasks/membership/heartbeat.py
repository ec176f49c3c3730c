"""The thread by which a device says that it lives: Celery's timer stops while its loop is busy."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from celery.utils.log import get_logger

from sutra_tasks.membership.devices import DeviceRecord, beat, keep_lease, leave

if TYPE_CHECKING:
    from redis import Redis

__all__ = ["Heartbeat", "Lease"]

logger = get_logger(__name__)


class Lease:
    """What a process knows of its own lease: others took it when its beats are counted anew."""

    def __init__(self, on_lost: Callable[[], None]) -> None:
        self._on_lost = on_lost
        self._beats = 0
        self._lost = False

    def counted(self, beats: int) -> None:
        """Take in how many beats of this process there are now."""
        # Not "is 1": if an answer is lost, it is the second beat that is heard of.
        self._lost = self._lost or beats <= self._beats
        self._beats = beats
        if self._lost:
            self._on_lost()
            self._lost = False  # not if that raised: the next beat tries again


class Heartbeat:
    """Registers a device, keeps its registration, and keeps its lease to the end of the process."""

    def __init__(
        self,
        client: Redis,
        describe: Callable[[], DeviceRecord],
        interval_s: float,
        *,
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        """Prepare.

        Args:
            client: the server with the fleet.
            describe: called before each heartbeat, on this thread.
            interval_s: seconds between two heartbeats.
            on_lost: called when the lease was lost: others do now what this process held.
        """
        self._client, self._describe, self._interval_s = client, describe, interval_s
        self._lease = Lease(on_lost)
        self._said: DeviceRecord | None = None
        self._leaving, self._now = threading.Event(), threading.Event()
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Register now, and keep the registration alive."""
        self._thread.start()

    def hasten(self) -> None:
        """Send the next heartbeat now: something changed that the router should know."""
        self._now.set()

    def leave(self) -> None:
        """Leave the fleet, so that the router sends nothing more; the lease goes on.

        What this process still holds is its own until it ends.
        """
        self._leaving.set()
        self._now.set()
        if self._thread.ident is not None:
            self._left.wait(self._interval_s + 5.0)

    def _run(self) -> None:
        while True:
            self._now.clear()
            try:
                self._step()
            except Exception as error:  # noqa: BLE001 - a device that lives must not fall silent
                logger.warning("heartbeat failed, trying again: %s", error)
                if self._leaving.is_set():
                    self._left.set()  # its entry expires
            self._now.wait(self._interval_s)

    def _step(self) -> None:
        if not self._leaving.is_set():
            self._said = self._describe()
            self._lease.counted(beat(self._client, self._said))
            return
        # Not described any more: whoever leaves is not looked at, and nothing there can go wrong.
        if self._said is not None:
            if not self._left.is_set():
                leave(self._client, self._said.id, self._said.incarnation)
                self._left.set()
            self._lease.counted(keep_lease(self._client, self._said.incarnation))
        self._left.set()
