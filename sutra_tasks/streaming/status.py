"""The status of streams: backlog and backpressure from the server, and metrics that devices publish."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import redis

from sutra_tasks import keys
from sutra_tasks.server_errors import server_words
from sutra_tasks.streaming.entries import NAME_OF_STREAM, is_stream
from sutra_tasks.streaming.metrics import WINDOW_S, StreamMetrics, percentiles

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["StreamStatus", "stream_status"]

TYPES: Final = {
    "in": "stream", "closed": "stream", "out": "stream", "dead": "stream", "texts": "zset",
    "takeable": "zset", "buffered": "string", "state": "hash", "totals": "hash",
    "upkeep": "string",
}  # fmt: skip
"""The type of each key of a stream that is looked at."""


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
        faults: what is wrong with the stream: keys of a wrong type, what the server refuses, and what
            devices could not do; empty if nothing is. A number that cannot be told is 0 or None.
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
    faults: tuple[str, ...] = ()

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
    listed: Any = client.smembers(keys.streams())
    names = sorted(name.decode(errors="replace") for name in listed)
    if only is not None:
        names = [name for name in names if name == only]
    reports = _reports(client)
    return [_status(client, name, reports) for name in names]


def _reports(client: redis.Redis) -> list[dict[str, Any]]:
    """Return what devices reported, without what is no report."""
    devices: Any = []
    with suppress(redis.ResponseError):  # another program uses the key; a device replaces it
        devices = client.hkeys(keys.stream_loads())
    names = [keys.stream_consumer(one.decode(errors="replace")) for one in devices]
    stored: Any = client.mget(names) if names else []
    found = []
    for report in stored:
        with suppress(ValueError, TypeError):
            if isinstance(said := json.loads(report), dict):
                found.append(said)
    return found


def _status(client: redis.Redis, name: str, reports: Sequence[dict[str, Any]]) -> StreamStatus:
    with client.pipeline(transaction=False) as pipe:
        for part in TYPES:
            pipe.type(keys.stream(name, part))
        for part in ("in", "closed", "out", "dead"):
            pipe.xlen(keys.stream(name, part))
        for part in ("in", "closed"):
            pipe.xinfo_groups(keys.stream(name, part))
        pipe.zcard(keys.stream(name, "texts"))
        pipe.hgetall(keys.stream(name, "state"))
        pipe.hgetall(keys.stream(name, "totals"))
        answers = pipe.execute(raise_on_error=False)
    found_types = dict(zip(TYPES, answers, strict=False))
    size, closed_size, unread, dead, groups, closed_groups, texts, state, totals = answers[len(TYPES) :]
    refused = [
        server_words(one)
        for one in (unread, dead, texts, state, totals)
        if isinstance(one, Exception) and not str(one).startswith("WRONGTYPE")
    ]
    closed = found_types["in"] == b"string"
    group = _device_group(closed_groups if closed else groups)
    state, totals = (one if isinstance(one, dict) else {} for one in (state, totals))
    return StreamStatus(
        name=name,
        size=_count(closed_size if closed else size),
        pending=group.get("pending", 0),
        lag=group.get("lag"),
        capacity=_parsed(int, state.get(b"capacity")),
        closed=closed,
        unread=_count(unread),
        dead=_count(dead),
        open_texts=_count(texts),
        throttle_rate=_parsed(float, state.get(b"throttle_rate")) or 1.0,
        load=_parsed(float, state.get(b"load")),
        devices=len(reports),
        totals={
            field.decode(errors="replace"): _parsed(int, value) or 0 for field, value in totals.items()
        },
        measured=_measured(name, reports),
        faults=tuple(
            dict.fromkeys([*_faults_of_keys(name, found_types), *refused, *_reported(name, reports)])
        ),
    )


def _faults_of_keys(name: str, found_types: Mapping[str, Any]) -> Iterable[str]:
    """Yield what is wrong with the name and the keys of a stream."""
    if not is_stream(name):
        yield f"no device reads a stream of this name: expected {NAME_OF_STREAM}; SREM {keys.streams()}"
        return
    for part, found in found_types.items():
        if isinstance(found, Exception):
            yield server_words(found)
            continue
        kind = found.decode()
        is_closed = part == "in" and kind == "string"
        if kind not in (TYPES[part], "none") and not is_closed:
            key = keys.stream(name, part)
            yield f"{key} is a {kind} and no {TYPES[part]}: rename or delete what another program wrote"


def _reported(name: str, reports: Sequence[dict[str, Any]]) -> Iterable[str]:
    """Yield what devices reported as wrong with a stream."""
    for report in reports:
        said = report.get(name)
        faults = said.get("faults", ()) if isinstance(said, dict) else ()
        yield from (str(one) for one in faults)


def _measured(name: str, reports: Sequence[dict[str, Any]]) -> StreamMetrics:
    """Return the metrics of all devices, without those that cannot be read."""
    total = StreamMetrics()
    for report in reports:
        with suppress(ValueError, TypeError, AttributeError):
            total = total.plus(StreamMetrics.from_json(report.get(name, {})))
    return total


def _count(answer: Any) -> int:
    """Return the server's count; 0 if it refused to count, which is among the faults."""
    return answer if isinstance(answer, int) else 0


def _parsed(kind: Callable[[bytes], Any], stored: bytes | None) -> Any:
    """Return a number from a hash; None if there is none."""
    if stored is None:
        return None
    with suppress(ValueError):
        return kind(stored)
    return None


def _device_group(groups: Any) -> dict[str, Any]:
    """Return the facts of the devices' consumer group; none if ``XINFO`` failed or there is no group."""
    if not isinstance(groups, list):
        return {}
    return next((one for one in groups if one["name"] == keys.DEVICES_GROUP.encode()), {})
