"""The status of streams: backlog and backpressure from the server, and metrics that devices publish."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from sutra_tasks import keys
from sutra_tasks.streaming.metrics import WINDOW_S, StreamMetrics, percentiles

if TYPE_CHECKING:
    import redis

__all__ = ["StreamStatus", "stream_status"]


@dataclass(frozen=True, slots=True)
class StreamStatus:
    """One stream at one moment.

    Attributes:
        name: the stream's name.
        size: entries that wait or are being embedded (``XLEN``).
        pending: entries that a device has read and not finished.
        lag: entries that no device has read; None where the server does not know.
        capacity: entries that may wait; None while no device reads the stream.
        closed: whether the stream is over its hard limit, so that ``XADD`` fails.
        unread: responses and errors in the output.
        dead: dead letters.
        open_texts: texts that are still being written.
        throttle_rate: share of their own rate that producers are asked to offer.
        load: mean load of the devices' machines, 0 to 1; None while no device reads the stream.
        devices: how many devices read streams.
        totals: counters since the stream began: accepted, refused, shed, backpressure_events.
        measured: metrics of the last minute, of all devices.
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
    measured: StreamMetrics

    @property
    def buffer_use(self) -> float | None:
        """Return size over capacity; over 1 if producers ignore backpressure."""
        return self.size / self.capacity if self.capacity else None

    @property
    def per_s(self) -> float:
        """Return the vectors a second of the last minute."""
        return self.measured.chunks / WINDOW_S

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object, with percentiles in place of histograms."""
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
    """Return the status of all streams, by name, or of one of them.

    Args:
        client: of the server with the queues; its answers are bytes.
        only: a stream's name; the list is empty if there is no such stream.
    """
    listed: Any = client.smembers(keys.STREAMS)
    names = sorted(name.decode(errors="replace") for name in listed)
    if only is not None:
        names = [name for name in names if name == only]
    devices: Any = client.hkeys(keys.STREAM_LOADS)
    found: Any = client.mget([keys.stream_consumer(one.decode()) for one in devices]) if devices else []
    reports = [json.loads(report) for report in found if report is not None]
    return [_status(client, name, reports) for name in names]


def _status(client: redis.Redis, name: str, reports: Sequence[dict[str, Any]]) -> StreamStatus:
    with client.pipeline(transaction=False) as pipe:
        pipe.type(keys.stream(name, "in"))
        for part in ("in", "closed", "out", "dead"):
            pipe.xlen(keys.stream(name, part))
        for part in ("in", "closed"):
            pipe.xinfo_groups(keys.stream(name, part))
        pipe.zcard(keys.stream(name, "texts"))
        pipe.hgetall(keys.stream(name, "state"))
        pipe.hgetall(keys.stream(name, "totals"))
        # While a stream is closed, `in` is no stream, and the commands on it fail.
        kind, size, closed_size, unread, dead, groups, closed_groups, texts, state, totals = (
            pipe.execute(raise_on_error=False)
        )
    closed = kind == b"string"
    group = _device_group(closed_groups if closed else groups)
    measured = StreamMetrics()
    for report in reports:
        measured = measured.plus(StreamMetrics.from_json(report.get(name, {})))
    return StreamStatus(
        name=name,
        size=closed_size if closed else size,
        pending=group.get("pending", 0),
        lag=group.get("lag"),
        capacity=int(state[b"capacity"]) if b"capacity" in state else None,
        closed=closed,
        unread=unread,
        dead=dead,
        open_texts=texts,
        throttle_rate=float(state.get(b"throttle_rate", 1.0)),
        load=float(state[b"load"]) if b"load" in state else None,
        devices=len(reports),
        totals={field.decode(): int(value) for field, value in totals.items()},
        measured=measured,
    )


def _device_group(groups: Any) -> dict[str, Any]:
    """Return the facts of the devices' consumer group; none if ``XINFO`` failed or there is no group."""
    if not isinstance(groups, list):
        return {}
    return next((one for one in groups if one["name"] == keys.DEVICES_GROUP.encode()), {})
