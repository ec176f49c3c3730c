"""The thread by which a device says that it lives: Celery's timer stops while its loop is busy."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from celery.utils.log import get_logger

from sutra_tasks import keys
from sutra_tasks.fleet.registry import DeviceRecord, beat, leave

if TYPE_CHECKING:
    from redis import Redis

__all__ = ["Heartbeat"]

logger = get_logger(__name__)


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
            on_lost: called when the lease is gone: others do now what this process holds.
        """
        self._client, self._describe, self._interval_s = client, describe, interval_s
        self._on_lost = on_lost
        self._leaving, self._now = threading.Event(), threading.Event()
        self._left = threading.Event()
        self._registered = False
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
        record = self._describe()
        if not self._leaving.is_set():
            beats = beat(self._client, record)
        else:
            if not self._left.is_set():
                leave(self._client, record.id, record.incarnation)
                self._left.set()
            beats = int(self._client.hincrby(keys.LEASES, record.incarnation, 1))
        if beats == 1 and self._registered:
            self._on_lost()
        self._registered = True
