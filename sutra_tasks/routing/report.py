"""What a router publishes once a second: the fleet's backlog, and a record of itself."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final

from sutra_tasks import keys
from sutra_tasks.client.admission import Backlog

if TYPE_CHECKING:
    import redis

    from sutra_tasks.routing.snapshot import Fleet

__all__ = ["RouterRecord", "backlog_of", "publish"]

VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class RouterRecord:
    """What a router says of itself.

    Attributes:
        name: of its worker, and its host: ``router@host``.
        pid: its process.
        incarnation: this start of it.
        routed: messages forwarded since the start.
        waiting: messages that wait in it for a device.
    """

    name: str
    pid: int
    incarnation: str
    routed: int
    waiting: int


def backlog_of(fleet: Fleet, queued: int, mean_tokens: float) -> Backlog:
    """Estimate what waits in the whole fleet.

    Args:
        fleet: the devices, with what they have not finished.
        queued: messages in the router's queue.
        mean_tokens: estimated tokens of one of them.
    """
    devices = fleet.eligible
    return Backlog(
        tokens=round(queued * mean_tokens) + sum(one.backlog_tokens for one in devices),
        tokens_per_s=sum(one.tokens_per_s or 0.0 for one in devices),
    )


def publish(client: redis.Redis, backlog: Backlog, record: RouterRecord, ttl_s: float) -> None:
    """Write both in one round trip; the record expires after ``ttl_s`` seconds."""
    with client.pipeline(transaction=False) as pipe:
        pipe.set(keys.backlog(), backlog.to_json(), ex=keys.BACKLOG_S)
        record_json = json.dumps({"v": VERSION, **asdict(record)})
        pipe.set(keys.router(record.incarnation), record_json, px=int(1000 * ttl_s))
        pipe.execute()
