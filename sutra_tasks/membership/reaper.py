"""Ends the leases of dead workers, and requeues the messages that they had and that wait for them.

A supervisor reports a death at once by :func:`reap`. The :class:`Reaper` finds the rest by leases:
workers of lost hosts, and workers that nobody supervises.
"""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING, Any, Final

from celery.utils.log import get_logger

from sutra_tasks import keys, lua
from sutra_tasks.broker.queues import device_of, queue_lengths
from sutra_tasks.broker.requeue import requeue_device_queue, requeue_in_flight
from sutra_tasks.membership.fleet import fleet_members, keep_lease, leave
from sutra_tasks.membership.leases import POLL_S, LeaseLossDetector, LeaseObservations

if TYPE_CHECKING:
    from collections.abc import Callable

    import redis


__all__ = ["Reaper", "end_if_replaced", "reap", "requeue_absent_devices", "requeue_waiting"]

logger = get_logger(__name__)

MARK_REAPED: Final = lua.script("membership/mark_reaped")
FORGET_QUEUE: Final = lua.script("membership/forget_queue")


def reap(client: redis.Redis, results: redis.Redis, incarnation: str, *, died: bool = True) -> int:
    """End the lease of a worker process, and requeue its messages and those that wait for its device.

    Messages that the worker had answered are dropped: it may have died before it acknowledged them.

    Any number of processes may do so at once, or again after one was killed in it: the lease is
    deleted last, so what remains is found again.

    Args:
        client: the broker.
        results: the results server, which says what the worker has answered. The process may still live,
            stopped or cut off: from here on it can store no error there.
        incarnation: the process.
        died: whether one of its messages may have caused its end.

    Returns:
        How many messages were requeued.
    """
    MARK_REAPED(results, mark=keys.reaped(incarnation), keep_s=keys.REAPED_S)
    device_id = device_of(incarnation)
    requeued = 0
    if device_id is not None:
        leave(client, device_id, incarnation)
        # The newer messages first: what is requeued last is taken first.
        requeued = requeue_waiting(client, device_id)
    requeued += requeue_in_flight(client, incarnation, died=died, results=results)
    client.delete(keys.suspect(incarnation))
    client.hdel(keys.leases(), incarnation)
    return requeued


def end_if_replaced(results: redis.Redis, incarnation: str) -> None:
    """End this process by SIGTERM if a reaper has ended its lease; its supervisor starts another.

    Args:
        results: the results server.
        incarnation: this process.
    """
    if results.exists(keys.reaped(incarnation)):
        logger.error("%s was silent for too long and is replaced", incarnation)
        os.kill(os.getpid(), signal.SIGTERM)


def requeue_waiting(client: redis.Redis, device_id: str) -> int:
    """Requeue what waits for a device, unless an incarnation that takes work is registered for it.

    Returns:
        How many messages were requeued.
    """
    if any(one.id == device_id and one.takes_work for one in fleet_members(client)):
        return 0
    return requeue_device_queue(client, device_id)


def requeue_absent_devices(client: redis.Redis, ttl_s: float) -> int:
    """Requeue what waits for devices that are not live or take no work.

    Args:
        client: the broker.
        ttl_s: seconds since its last heartbeat for which a device is live.

    Returns:
        How many messages were requeued.
    """
    registered: Any = client.zrange(keys.queues(), 0, -1)
    present = {one.id for one in fleet_members(client) if one.is_live(ttl_s) and one.takes_work}
    absent = sorted({name.decode() for name in registered} - present)
    waiting = queue_lengths(client, [keys.device_queue(name) for name in absent])
    requeued = 0
    for name in absent:
        if waiting[keys.device_queue(name)]:
            requeued += requeue_device_queue(client, name)
        else:
            FORGET_QUEUE(client, queues=keys.queues(), device_id=name, forget_s=keys.FORGET_AFTER_S)
    return requeued


class Reaper:
    """Observes leases and queues once a second, and keeps the lease of its own process.

    Any number of reapers may run.
    """

    def __init__(
        self,
        client: redis.Redis,
        results: redis.Redis,
        incarnation: str,
        *,
        sweep: Callable[[], None],
        lease_s: float,
        device_ttl_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare; :meth:`run` observes.

        Args:
            client: the broker.
            results: the results server.
            incarnation: this process.
            sweep: called after each uninterrupted observation.
            lease_s: seconds without a heartbeat after which a lease ends.
            device_ttl_s: seconds since its last heartbeat for which a device is live.
            clock: monotonic seconds.
        """
        self._client, self._results, self._incarnation = client, results, incarnation
        self._sweep = sweep
        self._lease_s, self._device_ttl_s, self._clock = lease_s, device_ttl_s, clock
        self._own_lease = LeaseLossDetector()
        self._observed = LeaseObservations()

    def step(self) -> float:
        """Reap what is due; return the seconds until the next observation."""
        self._own_lease.observe(keep_lease(self._client, self._incarnation))
        if self._own_lease.is_lost:
            end_if_replaced(self._results, self._incarnation)
            self._own_lease.is_lost = False
        raw: Any = self._client.hgetall(keys.leases())
        beats = {name.decode(): int(count) for name, count in raw.items()}
        # The clock is read after the answer: a silent server counts no heartbeats.
        before, self._observed = self._observed, self._observed.after(beats, self._clock())
        for incarnation in self._observed.ended(self._lease_s):
            requeued = reap(self._client, self._results, incarnation)
            if requeued:
                logger.warning("the lease of %s ended; %d messages requeued", incarnation, requeued)
        if not self._observed.is_uninterrupted_since(before):
            return POLL_S
        if requeued := requeue_absent_devices(self._client, self._device_ttl_s):
            logger.warning("%d messages waited for devices that are gone: requeued", requeued)
        self._sweep()
        return POLL_S

    def run(self) -> None:
        """Observe for ever; for a daemon thread."""
        while True:
            try:
                pause_s = self.step()
            except Exception as error:  # noqa: BLE001 - the next observation may succeed
                logger.warning("could not look after leases, trying again: %s", error)
                pause_s = POLL_S
            time.sleep(pause_s)
