"""Who is in the fleet: device records in Redis, kept alive by heartbeats.

A heartbeat writes the device's record and, in the sorted set ``sutra:fleet``, the *server's* time, so
clocks of hosts need not agree. A device lives while its last heartbeat is younger than
``SUTRA_DEVICE_TTL_S``; a dead one stays visible for an hour, then is forgotten.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Final

import redis
from celery.utils.log import get_logger

from sutra_tasks import keys
from sutra_tasks.errors import UnsupportedVersionError
from sutra_tasks.fleet.balancing import Device, Fleet
from sutra_tasks.fleet.held import lanes

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "DeviceRecord",
    "Heartbeat",
    "Sighting",
    "fleet_of",
    "leave",
    "queue_lengths",
    "sightings",
]

logger = get_logger(__name__)

VERSION: Final = 1

BEAT: Final = """#!lua flags=allow-oom
redis.call('SET', KEYS[2], ARGV[2], 'EX', ARGV[3])
local now = redis.call('TIME')
return redis.call('ZADD', KEYS[1], now[1] + now[2] / 1e6, ARGV[1])
"""
"""KEYS: the fleet, the record. ARGV: device id, record, seconds the record is kept. Allowed on a full
server: without heartbeats nobody would work it empty."""

SNAPSHOT: Final = """
local now = redis.call('TIME')
now = now[1] + now[2] / 1e6
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - tonumber(ARGV[1]))
local found = redis.call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES')
for i = 2, #found, 2 do found[i] = tostring(now - tonumber(found[i])) end
return found
"""
"""KEYS: the fleet. ARGV: seconds after which a device is forgotten. Returns ids and the ages of their
heartbeats, alternating."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRecord:
    """What one device worker says of itself; stored as JSON with a version."""

    id: str
    incarnation: str
    host: str
    pid: int
    engine: str
    compute: str
    model: str
    space: str
    width: int
    window: int
    started_at: float
    tasks: int = 0
    texts: int = 0
    tokens: int = 0
    batches: int = 0
    errors: int = 0
    waiting_texts: int = 0
    busy_s: float = 0.0
    p50_ms: float = 0.0
    p95_ms: float = 0.0

    def to_json(self) -> str:
        """Return the stored form."""
        return json.dumps({"v": VERSION, **asdict(self)})

    @classmethod
    def from_json(cls, text: str | bytes) -> DeviceRecord:
        """Read the stored form.

        Raises:
            UnsupportedVersionError: another version wrote it.
        """
        value: dict[str, Any] = json.loads(text)
        if value.get("v") != VERSION:
            raise UnsupportedVersionError("device record", str(value.get("v"))[:20], VERSION)
        return cls(**{field.name: value[field.name] for field in fields(cls)})


@dataclass(frozen=True, slots=True)
class Sighting:
    """A device and how long ago it was last heard of; no record if another version wrote it."""

    id: str
    heartbeat_age_s: float
    record: DeviceRecord | None


def beat(client: redis.Redis, record: DeviceRecord) -> None:
    """Say that a device lives, in one round trip."""
    client.eval(
        BEAT, 2, keys.FLEET, keys.device(record.id), record.id, record.to_json(),
        str(keys.FORGET_AFTER_S),
    )  # fmt: skip


def leave(client: redis.Redis, device_id: str) -> None:
    """Take a device out of the fleet at once; its record goes with it."""
    with client.pipeline() as pipe:
        pipe.zrem(keys.FLEET, device_id)
        pipe.delete(keys.device(device_id))
        pipe.execute()


def ages(client: redis.Redis) -> dict[str, float]:
    """Return seconds since the last heartbeat of every device not forgotten yet, in one round trip."""
    found = client.eval(SNAPSHOT, 1, keys.FLEET, str(keys.FORGET_AFTER_S))
    return {
        (name.decode() if isinstance(name, bytes) else name): max(0.0, float(age))
        for name, age in zip(found[::2], found[1::2], strict=True)
    }


def fleet_of(heartbeat_ages_s: dict[str, float], ttl_s: float) -> Fleet:
    """Reduce heartbeats to what a strategy needs."""
    live = sorted(name for name, age in heartbeat_ages_s.items() if age <= ttl_s)
    return Fleet(
        devices=tuple(Device(name, keys.device_queue(name)) for name in live),
        known=len(heartbeat_ages_s),
        oldest_heartbeat_s=max(heartbeat_ages_s.values(), default=None),
    )


def sightings(client: redis.Redis) -> list[Sighting]:
    """Return every device with its record, in order of their ids."""
    seen = sorted(ages(client).items())
    records = client.mget([keys.device(name) for name, _ in seen]) if seen else []
    return [
        Sighting(name, age, _readable(text)) for (name, age), text in zip(seen, records, strict=True)
    ]


def queue_lengths(client: redis.Redis, queues: Iterable[str]) -> dict[str, int]:
    """Return the messages waiting in each queue, over all its priorities, in one round trip."""
    names = list(queues)
    with client.pipeline(transaction=False) as pipe:
        for name in names:
            for one in lanes(name):
                pipe.llen(one)
        lengths = pipe.execute()
    step = len(lanes(""))
    return {name: sum(lengths[i * step : (i + 1) * step]) for i, name in enumerate(names)}


def _readable(text: bytes | str | None) -> DeviceRecord | None:
    try:
        return None if text is None else DeviceRecord.from_json(text)
    except UnsupportedVersionError:
        return None


class Heartbeat:
    """A thread of its own: Celery's timer stands still while its loop is busy."""

    def __init__(
        self, client: redis.Redis, describe: Callable[[], DeviceRecord], interval_s: float
    ) -> None:
        self._client, self._describe, self._interval_s = client, describe, interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Register now, and keep the registration alive."""
        self._thread.start()

    def stop(self) -> None:
        """Leave the fleet, so that the router sends nothing more."""
        if self._stop.is_set():
            return
        self._stop.set()
        if self._thread.ident is None:
            return  # it never joined
        self._thread.join()
        try:
            leave(self._client, self._describe().id)
        except redis.RedisError as error:
            logger.warning("could not leave the fleet (its entry expires): %s", error)

    def _run(self) -> None:
        while True:
            try:
                beat(self._client, self._describe())
            except Exception as error:  # noqa: BLE001 - a device that lives must not fall silent
                logger.warning("heartbeat failed, trying again: %s", error)
            if self._stop.wait(self._interval_s):
                return
