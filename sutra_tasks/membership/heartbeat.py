"""The thread that sends a device's heartbeats; Celery's timer stops while its loop is busy."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from celery.utils.log import get_logger

from sutra_tasks.membership.fleet import beat, keep_lease, leave
from sutra_tasks.membership.leases import LeaseLossDetector

if TYPE_CHECKING:
    from collections.abc import Callable

    from redis import Redis

    from sutra_tasks.membership.device_record import DeviceRecord

__all__ = ["Heartbeat"]

logger = get_logger(__name__)


class Heartbeat:
    """Registers a device, renews its registration, and keeps its lease to the end of the process."""

    def __init__(
        self,
        client: Redis,
        describe: Callable[[], DeviceRecord],
        interval_s: float,
        *,
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        """Prepare; :meth:`start` sends the first heartbeat.

        Args:
            client: the server with the fleet.
            describe: returns the device's record; called before each heartbeat, on this thread.
            interval_s: seconds between two heartbeats.
            on_lost: called when a reaper has ended the lease of this process, and again at each
                heartbeat until it does not raise.
        """
        self._client, self._describe, self._interval_s = client, describe, interval_s
        self._on_lost = on_lost
        self._lease = LeaseLossDetector()
        self._last_record: DeviceRecord | None = None
        self._leaving, self._now = threading.Event(), threading.Event()
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Register the device now, and renew its registration from then on."""
        self._thread.start()

    def hasten(self) -> None:
        """Send the next heartbeat now, because the record has changed."""
        self._now.set()

    def leave(self) -> None:
        """Leave the fleet, so that routers forward nothing more to this device.

        The lease is kept: the messages in flight stay with this process until it ends.
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
            except Exception as error:  # noqa: BLE001 - a live device must not fall silent
                logger.warning("heartbeat failed, trying again: %s", error)
                if self._leaving.is_set():
                    self._left.set()  # the registration expires by itself
            self._now.wait(self._interval_s)

    def _step(self) -> None:
        if not self._leaving.is_set():
            self._last_record = self._describe()
            self._check_lease(beat(self._client, self._last_record))
            return
        # A device that leaves is not described any more: a failure there must not keep it.
        record = self._last_record
        if record is not None:
            if not self._left.is_set():
                leave(self._client, record.id, record.incarnation)
                self._left.set()
            self._check_lease(keep_lease(self._client, record.incarnation))
        self._left.set()

    def _check_lease(self, beats: int) -> None:
        self._lease.observe(beats)
        if self._lease.is_lost:
            self._on_lost()
            self._lease.is_lost = False
