"""Names of devices: one live worker has each, and a newcomer never takes the name of one that lives.

The server remembers which incarnation has a name. Whether that worker lives is told by its lease alone:
a counter of heartbeats that rises. So a worker that was killed and starts again gets its name back once
its predecessor has been silent for a while, and a second fleet with the same names does not.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from sutra_tasks import keys, lua
from sutra_tasks.errors import DeviceNameTakenError
from sutra_tasks.membership.reaper import reap

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import redis

__all__ = ["Patience", "claim", "holders", "living", "release"]

CLAIM_NAME: Final = lua.script("membership/claim_name")
DELETE_IF_EQUAL: Final = lua.script("delete_if_equal")
POLL_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class Patience:
    """For how long a lease is watched before its worker counts as dead.

    Attributes:
        silent_s: seconds without a heartbeat, of a worker that has sent some.
        unborn_s: the same of a worker that has sent none: it may be loading its libraries.
    """

    silent_s: float
    unborn_s: float

    def allows(self, beats: int, waited_s: float) -> bool:
        """Say whether a worker with so many heartbeats may be silent for so long, and live."""
        return waited_s < (self.silent_s if beats else self.unborn_s)


def claim(
    client: redis.Redis,
    results: redis.Redis,
    device_id: str,
    incarnation: str,
    *,
    patience: Patience,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Take the name of a device, and begin the lease of its worker.

    Waits while it is not known whether the worker that has the name lives, and reaps one that does not.

    Args:
        client: the broker.
        results: the results server.
        device_id: the name.
        incarnation: the worker that takes it.
        patience: for how long the lease of the worker that has the name is watched.
        clock: monotonic seconds.
        sleep: pauses for so many seconds.

    Raises:
        DeviceNameTakenError: another worker of this name lives.
        redis.RedisError: the server did not answer.
    """
    while True:
        holder = CLAIM_NAME(
            client,
            name=keys.worker(device_id),
            leases=keys.leases(),
            incarnation=incarnation,
            keep_s=keys.REMEMBER_S,
        )
        if not holder:
            return
        other = {holder[0].decode(): int(holder[1])}
        if living(client, other, patience=patience, clock=clock, sleep=sleep):
            raise DeviceNameTakenError(device_id)
        for one in other:
            reap(client, results, one)


def release(client: redis.Redis, device_id: str, incarnation: str) -> None:
    """Give the name of a device back, unless another worker has taken it."""
    DELETE_IF_EQUAL(client, key=keys.worker(device_id), value=incarnation)


def holders(client: redis.Redis, device_ids: Sequence[str]) -> dict[str, int]:
    """Return the workers with a lease that have these names: incarnation -> heartbeats so far."""
    found: Any = client.mget([keys.worker(one) for one in device_ids]) if device_ids else []
    return _beats(client, [one.decode() for one in found if one is not None])


def living(
    client: redis.Redis,
    beats: Mapping[str, int],
    *,
    patience: Patience,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> bool:
    """Watch leases until one of them beats, or none can be expected to beat any more.

    Args:
        client: the broker.
        beats: heartbeats so far, by incarnation.
        patience: for how long each is watched.
        clock: monotonic seconds.
        sleep: pauses for so many seconds.

    Returns:
        Whether one of them beats.
    """
    since = clock()
    while watched := [one for one, count in beats.items() if patience.allows(count, clock() - since)]:
        now = _beats(client, watched)
        if any(now.get(one, 0) > beats[one] for one in watched):
            return True
        beats = {one: count for one, count in now.items() if one in watched}
        sleep(POLL_S)
    return False


def _beats(client: redis.Redis, incarnations: Sequence[str]) -> dict[str, int]:
    """Return the heartbeats so far of those that have a lease."""
    counts: Any = client.hmget(keys.leases(), list(incarnations)) if incarnations else []
    pairs = zip(incarnations, counts, strict=True)
    return {name: int(count) for name, count in pairs if count is not None}
