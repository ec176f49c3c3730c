"""How the streams are: what the server knows of each, and what its devices measured of late."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from sutra_tasks import keys
from sutra_tasks.streaming.metrics import WINDOW_S, Measurements, percentiles
from sutra_tasks.streaming.scripts import GROUP

if TYPE_CHECKING:
    import redis

__all__ = ["StreamStatus", "stream_status"]

PARTS = ("in", "closed", "out", "dead")


@dataclass(frozen=True, slots=True)
class StreamStatus:
    """One stream at one moment.

    Attributes:
        name: its name.
        size: entries that wait or are being worked on: XLEN.
        pending: those of them that a device has.
        lag: those that no device has; None where the server does not know.
        capacity: entries that may wait; None while no device reads it.
        closed: whether it is over its hard limit, so that ``XADD`` fails.
        unread: responses in the output.
        dead: dead letters.
        open_texts: texts that are being written.
        throttle_rate: what producers are asked to offer, of their own rate.
        load: mean of the devices' machines, 0 to 1.
        devices: that read it.
        totals: since it began: accepted, refused, shed, backpressure_events.
        measured: of the last minute, by all devices.
    """

    name: str
    size: int
    pending: int
    lag: int | None
    capacity: int | None
    closed: bool
    unread: int
    dead: int
    open_texts: int
    throttle_rate: float
    load: float | None
    devices: int
    totals: dict[str, int]
    measured: Measurements

    @property
    def buffer_use(self) -> float | None:
        """Return the share of the capacity in use; over 1 if producers ignore the signal."""
        return self.size / self.capacity if self.capacity else None

    @property
    def per_s(self) -> float:
        """Return vectors a second over the last minute."""
        return self.measured.chunks / WINDOW_S

    def to_json(self) -> dict[str, Any]:
        """Return the facts as JSON, with percentiles in place of histograms."""
        facts = asdict(self)
        measured = facts.pop("measured")
        for name in ("latency", "chunk", "formation"):
            times = percentiles(getattr(self.measured, name))
            measured[f"{name}_ms"] = {f"p{share}": value for share, value in times.items()}
            del measured[name]
        for name in ("error_rate", "overlap_ratio", "consistency"):
            measured[name] = getattr(self.measured, name)
        more = {"buffer_use": self.buffer_use, "per_s": round(self.per_s, 2)}
        return {**facts, **more, "last_minute": measured}


def stream_status(client: redis.Redis, only: str | None = None) -> list[StreamStatus]:
    """Return how all streams are, or one of them, in a few round trips; ``client`` answers bytes."""
    listed: Any = client.smembers(keys.STREAMS)
    names = sorted(name.decode(errors="replace") for name in listed)
    if only is not None:
        names = [name for name in names if name == only]
    seen: Any = client.hkeys(keys.STREAM_LOADS)
    reports: Any = client.mget([keys.stream_consumer(one.decode()) for one in seen]) if seen else []
    measured = [json.loads(report) for report in reports if report is not None]
    return [_status(client, name, measured) for name in names]


def _status(client: redis.Redis, name: str, reports: Sequence[dict[str, Any]]) -> StreamStatus:
    with client.pipeline(transaction=False) as pipe:
        pipe.type(keys.stream(name, "in"))
        for part in PARTS:
            pipe.xlen(keys.stream(name, part))
        for part in PARTS[:2]:
            pipe.xinfo_groups(keys.stream(name, part))
        pipe.zcard(keys.stream(name, "texts"))
        pipe.hgetall(keys.stream(name, "state"))
        pipe.hgetall(keys.stream(name, "totals"))
        # While a stream is closed, `in` is no stream and its answers are errors.
        kind, *lengths, opened, held, texts, state, totals = pipe.execute(raise_on_error=False)
    closed = kind == b"string"
    groups = held if closed else opened
    group: dict[str, Any] = next(
        (one for one in (groups if isinstance(groups, list) else []) if one["name"] == GROUP.encode()),
        {},
    )
    total = Measurements()
    mine = [report[name] for report in reports if name in report]
    for one in mine:
        total = total.plus(Measurements.from_json(one))
    return StreamStatus(
        name=name,
        size=lengths[1] if closed else lengths[0],
        pending=group.get("pending", 0),
        lag=group.get("lag"),
        capacity=int(state[b"capacity"]) if b"capacity" in state else None,
        closed=closed,
        unread=lengths[2],
        dead=lengths[3],
        open_texts=texts,
        throttle_rate=float(state.get(b"throttle_rate", 1.0)),
        load=float(state[b"load"]) if b"load" in state else None,
        devices=len(reports),
        totals={field.decode(): int(value) for field, value in totals.items()},
        measured=total,
    )
