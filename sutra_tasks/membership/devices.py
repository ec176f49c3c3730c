"""Who is in the fleet: device records in Redis, kept alive by heartbeats.

A heartbeat writes the device's record and, in the sorted set ``sutra:fleet``, the *server's* time, so
clocks of hosts need not agree. A device lives while its last heartbeat is younger than
``SUTRA_DEVICE_TTL_S``; a dead one stays visible for an hour, then is forgotten.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from sutra_tasks import keys
from sutra_tasks.broker.queues import MOST_CREDIT, lanes
from sutra_tasks.errors import UnsupportedVersionError
from sutra_tasks.health.states import State

if TYPE_CHECKING:
    from collections.abc import Iterable

    import redis

__all__ = [
    "DeviceRecord",
    "Sighting",
    "beat",
    "keep_lease",
    "leave",
    "queue_lengths",
    "serves",
    "sightings",
]

VERSION: Final = 4

BEAT: Final = """#!lua flags=allow-oom
local now = redis.call('TIME')
now = now[1] + now[2] / 1e6
redis.call('SET', KEYS[4], ARGV[3], 'EX', ARGV[4])
redis.call('ZADD', KEYS[1], now, ARGV[1])
redis.call('ZADD', KEYS[2], now, ARGV[1])
local waiting = redis.call('EXISTS', unpack(KEYS, 6))
if waiting == 0 then redis.call('DEL', KEYS[5]) else redis.call('EXPIRE', KEYS[5], ARGV[4]) end
return redis.call('HINCRBY', KEYS[3], ARGV[2], 1)
"""
"""KEYS: the fleet, the queues, the leases, the record, the load, the held list, the device's lanes.
ARGV: device id, incarnation, record, seconds the record is kept. Returns the beats of this incarnation.
A device without work has no load: whatever was counted wrongly, in an upgrade say, ends here. Allowed on
a full server: without heartbeats nobody would work it empty."""

KEEP_LEASE: Final = """#!lua flags=allow-oom
return redis.call('HINCRBY', KEYS[1], ARGV[1], 1)
"""
"""KEYS: the leases. ARGV: incarnation. Returns its beats. Allowed on a full server, as beats are."""

LEAVE: Final = """#!lua flags=allow-oom
local record = redis.call('GET', KEYS[2])
if record and not string.find(record, ARGV[2], 1, true) then return 0 end
redis.call('ZREM', KEYS[1], ARGV[1])
return redis.call('DEL', KEYS[2])
"""
"""KEYS: the fleet, the record. ARGV: device id, and the incarnation: another one's record stays."""

SNAPSHOT: Final = """
local now = redis.call('TIME')
now = now[1] + now[2] / 1e6
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - tonumber(ARGV[1]))
local found = redis.call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES')
local seen = {}
for i = 1, #found, 2 do
  seen[#seen + 1] = {
    found[i], tostring(now - tonumber(found[i + 1])), redis.call('GET', ARGV[2] .. found[i]),
    redis.call('HMGET', ARGV[3] .. found[i],
               'messages', 'credit', 'tokens_dispatched', 'tokens_completed')
  }
end
return seen
"""
"""KEYS: the fleet. ARGV: seconds after which a device is forgotten; what names of records and of loads
begin with. Returns id, age of the heartbeat, record and load of each device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRecord:
    """What one device worker says of itself; stored as JSON with a version.

    Speeds, latencies and loads are in estimated tokens (:attr:`sutra_tasks.client.call.Demand.tokens`).
    ``models`` are those it has in memory, by every name that calls may use. ``candidate`` is the
    promotion it prepares for, and ``candidate_state`` is ``loading``, ``ready``, or why it cannot.
    ``follows`` is the model whose serving version it serves, whichever that is; empty if it stays.
    ``attention`` and ``dtype`` are how it computes, ``attention_reason`` why it does not do so better.
    """

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
    models: tuple[str, ...] = ()
    candidate: str = ""
    candidate_state: str = ""
    follows: str = ""
    attention: str = ""
    dtype: str = ""
    attention_reason: str = ""
    state: State = State.STARTING
    reason: str = ""
    warnings: tuple[str, ...] = ()
    tasks: int = 0
    texts: int = 0
    tokens: int = 0
    batches: int = 0
    errors: int = 0
    waiting_texts: int = 0
    busy_s: float = 0.0
    p50_ms: float = 0.0
    p95_ms: float = 0.0
    tokens_per_s: float | None = None
    latency_s: float | None = None
    latency_per_token_s: float | None = None
    credit_tokens: int = 0
    uncounted_messages: int = 0
    uncounted_tokens: int = 0
    memory_bytes: int | None = None
    memory_share: float | None = None

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
        known = {field.name: value[field.name] for field in fields(cls)}
        tuples = {name: tuple(value[name]) for name in ("models", "warnings")}
        return cls(**known | tuples | {"state": State(value["state"])})


@dataclass(frozen=True, slots=True)
class Sighting:
    """A device, how long ago it was last heard of, and what it was sent and has not finished.

    No record if another version wrote it.
    """

    id: str
    heartbeat_age_s: float
    record: DeviceRecord | None
    backlog_messages: int = 0
    backlog_tokens: int = 0
    credit_used: int = 0


def beat(client: redis.Redis, record: DeviceRecord) -> int:
    """Say that a device lives, in one round trip; return how often this incarnation has said so."""
    names = [
        keys.FLEET, keys.QUEUES, keys.LEASES, keys.device(record.id), keys.load(record.id),
        keys.held(record.incarnation), *lanes(keys.device_queue(record.id)),
    ]  # fmt: skip
    facts = [record.id, record.incarnation, record.to_json(), str(keys.FORGET_AFTER_S)]
    return int(client.eval(BEAT, len(names), *names, *facts))


def keep_lease(client: redis.Redis, incarnation: str) -> int:
    """Say that a process lives that is no device in the fleet; return how often it has said so."""
    return int(client.eval(KEEP_LEASE, 1, keys.LEASES, incarnation))


def leave(client: redis.Redis, device_id: str, incarnation: str) -> None:
    """Take a device out of the fleet at once, unless another incarnation serves it by now."""
    client.eval(LEAVE, 2, keys.FLEET, keys.device(device_id), device_id, f'"{incarnation}"')


def sightings(client: redis.Redis) -> list[Sighting]:
    """Return every device not forgotten yet, in order of their ids, in one round trip."""
    seen = client.eval(SNAPSHOT, 1, keys.FLEET, str(keys.FORGET_AFTER_S), keys.device(""), keys.load(""))
    found = []
    for name, age, record, counts in seen:
        messages, credit, dispatched, completed = (int(count or 0) for count in counts)
        readable = None if record is None else _readable(record)
        past, past_tokens = (
            (readable.uncounted_messages, readable.uncounted_tokens) if readable else (0, 0)
        )
        found.append(
            Sighting(
                id=name.decode() if isinstance(name, bytes) else name,
                heartbeat_age_s=max(0.0, float(age)),
                record=readable,
                backlog_messages=max(0, messages) + past,
                backlog_tokens=max(0, dispatched - completed) + past_tokens,
                # Not known one by one: at most so much.
                credit_used=max(0, credit) + min(past_tokens, past * MOST_CREDIT),
            )
        )
    return sorted(found, key=lambda one: one.id)


def serves(seen: Sighting) -> bool:
    """Say whether a device that lives takes work, however well."""
    return seen.record is None or seen.record.state not in (State.STARTING, State.REFUSED)


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


@lru_cache(maxsize=1024)  # a record is read ten times before it changes
def _readable(text: bytes | str) -> DeviceRecord | None:
    try:
        return DeviceRecord.from_json(text)
    except UnsupportedVersionError:
        return None
