"""Work whose worker is gone: found by leases, returned to the queue it is routed from.

Deaths are reported by the supervisor at once; leases are for hosts that are lost and for workers that
nobody supervises. A lease is a counter of heartbeats in ``sutra:leases``. It ends when the reaper has
seen it stand still for ``SUTRA_LEASE_S`` of its *own* uninterrupted looking, so a server that pauses,
or a reaper that does, ends nobody's lease.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from celery.utils.log import get_logger

from sutra_tasks import keys
from sutra_tasks.broker.queues import device_of
from sutra_tasks.broker.requeue import give_back_all, give_back_queue
from sutra_tasks.membership.devices import keep_lease, leave, queue_lengths, serves, sightings
from sutra_tasks.membership.heartbeat import Lease

if TYPE_CHECKING:
    import redis


__all__ = ["Leases", "Reaper", "end_if_replaced", "rescue", "rescue_queues"]

logger = get_logger(__name__)

POLL_S: Final = 1.0
INTERRUPTED_S: Final = 3 * POLL_S
"""A look this long after the last one proves nothing of the time between."""

MARK: Final = """#!lua flags=allow-oom
return redis.call('SET', KEYS[1], 1, 'EX', ARGV[1])
"""
"""KEYS: the mark that a lease has ended. ARGV: seconds it is kept. Allowed on a full server: without it
nothing goes back and is worked off."""


def rescue(client: redis.Redis, results: redis.Redis, incarnation: str, *, died: bool = True) -> int:
    """Return what a worker process held, and what waits for its device; say how many messages.

    Safe to repeat, to call from several places at once, and to be killed in: what is left is found
    again, because the lease goes last.

    Args:
        client: the server with the queues.
        results: the server with the results. The process may live, stopped or cut off: from here on it
            can store no error there.
        incarnation: the process.
        died: whether its messages may have caused its end.
    """
    results.eval(MARK, 1, keys.reaped(incarnation), str(keys.REAPED_S))
    device_id = device_of(incarnation)
    if device_id is not None:
        leave(client, device_id, incarnation)
    # First what is younger: what goes back last is next in line.
    returned = rescue_queues(client, only=device_id) if device_id is not None else 0
    returned += give_back_all(client, incarnation, died=died)
    client.delete(keys.suspect(incarnation))
    client.hdel(keys.LEASES, incarnation)
    return returned


def end_if_replaced(results: redis.Redis, incarnation: str) -> None:
    """End this process if others do its work by now; whoever supervises it starts another.

    Args:
        results: the server with the results.
        incarnation: this process.
    """
    if results.exists(keys.reaped(incarnation)):
        logger.error("%s was silent for too long and is replaced", incarnation)
        os.kill(os.getpid(), signal.SIGTERM)


def rescue_queues(client: redis.Redis, *, ttl_s: float = 0.0, only: str | None = None) -> int:
    """Return what waits for devices that are not there or take no work; say how many messages.

    Args:
        client: the server with the queues.
        ttl_s: how long a silent device counts as there.
        only: look at this device only; whoever registered it serves, however long ago.
    """
    registered: Any = client.zrange(keys.QUEUES, 0, -1) if only is None else [only.encode()]
    known = {name.decode() for name in registered}
    there = {
        one.id
        for one in sightings(client)
        if (only is not None or one.heartbeat_age_s <= ttl_s) and serves(one)
    }
    gone = sorted(known - there)
    if not gone:
        return 0
    waiting = queue_lengths(client, [keys.device_queue(name) for name in gone])
    returned = 0
    for name in gone:
        if waiting[keys.device_queue(name)]:
            returned += give_back_queue(client, name)
        elif only is None:
            client.eval(FORGET_QUEUE, 1, keys.QUEUES, name, str(keys.FORGET_AFTER_S))
    return returned


FORGET_QUEUE: Final = """
local now = redis.call('TIME')
local beaten = redis.call('ZSCORE', KEYS[1], ARGV[1])
if beaten and tonumber(now[1]) - tonumber(beaten) > tonumber(ARGV[2]) then
  return redis.call('ZREM', KEYS[1], ARGV[1])
end
return 0
"""
"""KEYS: the queues. ARGV: device id, seconds after which a device is forgotten."""


@dataclass(frozen=True, slots=True)
class Leases:
    """What a reaper has seen: the beats of each incarnation, and since when they stand still."""

    seen_at: float = -float("inf")
    still: Mapping[str, tuple[int, float]] = field(default_factory=dict)

    def after(self, beats: Mapping[str, int], now: float) -> Leases:
        """Return what is known after one more look.

        Args:
            beats: heartbeats so far, by incarnation.
            now: monotonic seconds.
        """
        before = self.still if now - self.seen_at <= INTERRUPTED_S else {}
        return Leases(
            now,
            {
                name: before[name] if name in before and before[name][0] == count else (count, now)
                for name, count in beats.items()
            },
        )

    def follows(self, before: Leases) -> bool:
        """Say whether nothing interrupted the looking since ``before``."""
        return self.seen_at - before.seen_at <= INTERRUPTED_S

    def ended(self, lease_s: float) -> list[str]:
        """Return the incarnations whose lease is over."""
        return [name for name, (_, since) in self.still.items() if self.seen_at - since >= lease_s]


class Reaper:
    """One look a second at leases and queues, which keeps the lease of its own process, too.

    Any number of them may run.
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
        self._client, self._results, self._incarnation = client, results, incarnation
        self._sweep = sweep
        self._lease_s, self._device_ttl_s, self._clock = lease_s, device_ttl_s, clock
        self._own = Lease(lambda: end_if_replaced(results, incarnation))
        self._leases = Leases()

    def step(self) -> float:
        """Rescue what is due; return the seconds until the next look."""
        self._own.counted(keep_lease(self._client, self._incarnation))
        raw: Any = self._client.hgetall(keys.LEASES)
        beats = {name.decode(): int(count) for name, count in raw.items()}
        # The clock is read after the answer: while the server was silent nobody could beat.
        before, self._leases = self._leases, self._leases.after(beats, self._clock())
        for incarnation in self._leases.ended(self._lease_s):
            returned = rescue(self._client, self._results, incarnation)
            if returned:
                logger.warning("the lease of %s ended; %d messages went back", incarnation, returned)
        if not self._leases.follows(before):
            return POLL_S
        if moved := rescue_queues(self._client, ttl_s=self._device_ttl_s):
            logger.warning("%d messages waited for devices that are gone and went back", moved)
        self._sweep()
        return POLL_S

    def run(self) -> None:
        """Look for ever; for a daemon thread."""
        waiting = threading.Event()
        while True:
            try:
                pause_s = self.step()
            except Exception as error:  # noqa: BLE001 - the next look may succeed
                logger.warning("could not look after leases, trying again: %s", error)
                pause_s = POLL_S
            waiting.wait(pause_s)
