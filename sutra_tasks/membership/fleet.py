"""The fleet in Redis: heartbeats register devices, and one script reads them all.

A heartbeat writes the device's record and, in the sorted set ``sutra:fleet``, the *server's* time, so
clocks of hosts need not agree. A device is live while its last heartbeat is younger than
``SUTRA_DEVICE_TTL_S``; a dead one stays visible for :data:`~sutra_tasks.keys.FORGET_AFTER_S`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from sutra_tasks import keys, lua
from sutra_tasks.broker.load import MOST_CREDIT
from sutra_tasks.broker.queues import lanes
from sutra_tasks.errors import UnsupportedVersionError
from sutra_tasks.membership.device_record import DeviceRecord

if TYPE_CHECKING:
    import redis

__all__ = ["FleetMember", "beat", "fleet_members", "keep_lease", "leave"]

BEAT: Final = lua.script("membership/beat")
KEEP_LEASE: Final = lua.script("membership/keep_lease")
LEAVE: Final = lua.script("membership/leave")
FLEET_MEMBERS: Final = lua.script("membership/fleet_members")


@dataclass(frozen=True, slots=True)
class FleetMember:
    """One registered device: its last heartbeat, its record, and its load.

    Attributes:
        id: of the device.
        heartbeat_age_s: seconds since its last heartbeat.
        record: what it says of itself; None if another version of this package wrote it.
        backlog_messages: messages that it was sent and has not finished.
        backlog_tokens: their estimated tokens.
        credit_used: the same, where each message counts ``MOST_CREDIT`` at most.
    """

    id: str
    heartbeat_age_s: float
    record: DeviceRecord | None
    backlog_messages: int = 0
    backlog_tokens: int = 0
    credit_used: int = 0

    def is_live(self, ttl_s: float) -> bool:
        """Say whether its last heartbeat is at most so many seconds old."""
        return self.heartbeat_age_s <= ttl_s

    @property
    def takes_work(self) -> bool:
        """Whether the device takes work while it is live."""
        return self.record is None or self.record.state.takes_work


def beat(client: redis.Redis, record: DeviceRecord) -> int:
    """Register a device, or renew its registration, in one round trip.

    Returns:
        Heartbeats of this incarnation so far.
    """
    beats: int = BEAT(
        client,
        fleet=keys.fleet(),
        queues=keys.queues(),
        leases=keys.leases(),
        record=keys.device(record.id),
        load=keys.load(record.id),
        in_flight=keys.in_flight(record.incarnation),
        lanes=lanes(keys.device_queue(record.id)),
        device_id=record.id,
        incarnation=record.incarnation,
        record_json=record.to_json(),
        keep_s=keys.FORGET_AFTER_S,
    )
    return beats


def keep_lease(client: redis.Redis, incarnation: str) -> int:
    """Count a heartbeat of a process that is no device of the fleet; return its heartbeats so far."""
    beats: int = KEEP_LEASE(client, leases=keys.leases(), incarnation=incarnation)
    return beats


def leave(client: redis.Redis, device_id: str, incarnation: str) -> None:
    """Take a device out of the fleet, unless another incarnation has registered it since."""
    LEAVE(
        client,
        fleet=keys.fleet(),
        record=keys.device(device_id),
        device_id=device_id,
        incarnation=f'"{incarnation}"',
    )


def fleet_members(client: redis.Redis) -> list[FleetMember]:
    """Return every device that is not forgotten yet, in order of their ids, in one round trip."""
    found = FLEET_MEMBERS(
        client,
        fleet=keys.fleet(),
        records=keys.device(""),
        loads=keys.load(""),
        forget_s=keys.FORGET_AFTER_S,
    )
    return sorted((_member(*one) for one in found), key=lambda one: one.id)


def _member(
    device_id: bytes, age_s: bytes, record_json: bytes | None, load: list[bytes | None]
) -> FleetMember:
    messages, credit, dispatched, completed = (int(count or 0) for count in load)
    record = None if record_json is None else _read_record(record_json)
    # No load counts messages that came past the router; their device says how many it has.
    uncounted = record.uncounted_messages if record is not None else 0
    uncounted_tokens = record.uncounted_tokens if record is not None else 0
    return FleetMember(
        id=device_id.decode(),
        heartbeat_age_s=max(0.0, float(age_s)),
        record=record,
        backlog_messages=max(0, messages) + uncounted,
        backlog_tokens=max(0, dispatched - completed) + uncounted_tokens,
        # The tokens of each are not known: together they use at most so much credit.
        credit_used=max(0, credit) + min(uncounted_tokens, uncounted * MOST_CREDIT),
    )


@lru_cache(maxsize=1024)  # a record is read ten times before it changes
def _read_record(text: bytes) -> DeviceRecord | None:
    try:
        return DeviceRecord.from_json(text)
    except UnsupportedVersionError:
        return None
