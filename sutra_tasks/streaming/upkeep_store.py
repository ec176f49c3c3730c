"""The state of a stream, as devices look after it: its backlog, its backpressure, and its idle texts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from sutra_tasks import keys, lua
from sutra_tasks.streaming import store
from sutra_tasks.streaming.backpressure import ACTIONS, Level

if TYPE_CHECKING:
    import redis

__all__ = ["StreamState", "UpkeepStore"]

HARD_LIMIT: Final = 2
"""Times its capacity at which a stream is closed to ``XADD`` itself."""
MOST_OPEN_TEXTS: Final = 10_000
ABANDONED_S: Final = 24 * 3600
"""Seconds without growth after which a text is over, though no producer ended it."""
LEASE_MS: Final = 150
"""Milliseconds for which one device has the upkeep of a stream: the least time between two upkeeps."""
FLUSH_BATCH: Final = 64

FLUSH_TEXTS: Final = lua.script("streaming/lua/flush_texts", BATCH=FLUSH_BATCH)
CLOSE: Final = lua.script("streaming/lua/close")
REOPEN: Final = lua.script("streaming/lua/reopen")
REPORT_LOAD: Final = lua.script("streaming/lua/report_load")
REMOVE_CONSUMERS: Final = lua.script("streaming/lua/remove_consumers")


@dataclass(frozen=True, slots=True)
class StreamState:
    """One stream at one moment.

    Attributes:
        size: entries that wait or are being worked on.
        closed: whether it is over its hard limit, so that ``XADD`` fails.
        unread: responses that no reader has acknowledged.
        level: its level of backpressure.
        loads: load of each device's machine, 0 to 1, by incarnation.
    """

    size: int
    closed: bool
    unread: int
    level: Level
    loads: Mapping[str, float]


class UpkeepStore:
    """States of streams on the server; safe to use from many threads.

    Every method raises :class:`redis.RedisError` if the server does not do it.
    """

    def __init__(self, client: redis.Redis, incarnation: str) -> None:
        """Use a client whose answers are bytes.

        Args:
            client: of the server with the queues.
            incarnation: of this worker.
        """
        self._client, self._incarnation = client, incarnation

    def lease(self, stream: str, load: float) -> StreamState | None:
        """Take the lease on a stream's upkeep, and return the stream's state.

        Args:
            stream: the stream.
            load: of this machine, 0 to 1.

        Returns:
            None if another device has the lease.
        """
        with self._client.pipeline(transaction=False) as pipe:
            pipe.set(keys.stream(stream, "upkeep"), self._incarnation, nx=True, px=LEASE_MS)
            pipe.type(keys.stream(stream, "in"))
            for part in ("in", "closed", "out"):
                pipe.xlen(keys.stream(stream, part))
            pipe.hget(keys.stream(stream, "state"), "level")
            pipe.hgetall(keys.stream_loads())
            leased, kind, size, closed, unread, level, loads = pipe.execute(raise_on_error=False)
        is_closed = kind == b"string"
        # While a stream is closed, `in` is no stream, and XLEN fails.
        size = closed if is_closed else size
        for found in (leased, kind, size, unread, level):
            if isinstance(found, Exception):
                raise found
        if not leased:
            return None
        return StreamState(
            size, is_closed, unread, _level_of(level), {**_loads_of(loads), self._incarnation: load}
        )

    def report_load(self, load: float) -> None:
        """Report the load of this machine, and forget loads that were reported long ago."""
        REPORT_LOAD(
            self._client,
            loads=keys.stream_loads(),
            device=self._incarnation,
            load=f"{load:.3f}",
            forget_s=keys.STATE_S,
        )

    def report_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Publish what this device has measured, as JSON."""
        self._client.set(keys.stream_consumer(self._incarnation), json.dumps(metrics), ex=keys.STATE_S)

    def remove_reports(self) -> None:
        """Remove what this device has reported."""
        with self._client.pipeline(transaction=False) as pipe:
            pipe.hdel(keys.stream_loads(), self._incarnation)
            pipe.delete(keys.stream_consumer(self._incarnation))
            pipe.execute()

    def publish_backpressure(
        self, stream: str, level: Level, before: Level, *, capacity: int, load: float, per_s: float
    ) -> None:
        """Tell producers how full a stream is and how much to slow down.

        Args:
            stream: the stream.
            level: the level of backpressure.
            before: the level until now.
            capacity: entries that may wait.
            load: mean of the devices' machines, 0 to 1.
            per_s: vectors a second of all devices.
        """
        action = ACTIONS[level]
        name = keys.stream(stream, "state")
        state: Mapping[Any, Any] = {
            "level": int(level),
            "capacity": capacity,
            "throttle_rate": str(action.throttle_rate),
            "shed": int(action.shed_low_priority),
            "load": f"{load:.3f}",
            "per_s": f"{per_s:.1f}",
        }
        with self._client.pipeline(transaction=False) as pipe:
            pipe.hset(name, mapping=state)
            pipe.expire(name, keys.STATE_S)
            if level > before:
                pipe.hincrby(keys.stream(stream, "totals"), "backpressure_events", 1)
                pipe.expire(keys.stream(stream, "totals"), keys.REMEMBER_S)
            pipe.execute()

    def enforce_hard_limit(self, stream: str, state: StreamState, capacity: int) -> None:
        """Close a stream to producers that ignore backpressure; open it again at half its capacity."""
        names = {"entries": keys.stream(stream, "in"), "closed_entries": keys.stream(stream, "closed")}
        if state.closed:
            REOPEN(self._client, **names, most=capacity // 2)
        elif state.size >= HARD_LIMIT * capacity:
            reason = (
                f"stream {stream} is closed: {state.size} entries wait; add again when there are fewer"
            )
            CLOSE(self._client, **names, hard_limit=HARD_LIMIT * capacity, reason=reason)

    def flush_texts(self, stream: str, idle_flush_s: float) -> None:
        """Have open texts embedded as they are: idle, abandoned, or too many to be kept.

        Args:
            stream: the stream.
            idle_flush_s: seconds without growth after which a text is idle; 0: it never is.
        """
        FLUSH_TEXTS(
            self._client,
            texts=keys.stream(stream, "texts"),
            takeable=keys.stream(stream, "takeable"),
            buffered=keys.stream(stream, "buffered"),
            state=keys.stream(stream, "state"),
            text=keys.stream(stream, "text:"),
            idle_ms=int(1000 * idle_flush_s),
            abandoned_ms=1000 * ABANDONED_S,
            most_texts=MOST_OPEN_TEXTS,
            most_buffered=store.MOST_BUFFERED_BYTES,
            state_s=keys.STATE_S,
        )

    def remove_silent_consumers(self, stream: str) -> None:
        """Remove devices and readers from a stream that left it long ago and have nothing pending."""
        REMOVE_CONSUMERS(
            self._client,
            streams=[keys.stream(stream, "in"), keys.stream(stream, "out")],
            groups=[keys.DEVICES_GROUP, keys.READERS_GROUP],
            silent_ms=1000 * keys.FORGET_AFTER_S,
        )


def _level_of(stored: bytes | None) -> Level:
    """Return a stored level; the lowest for what is none: the next upkeep writes another one."""
    try:
        return Level(int(stored or 0))
    except ValueError:
        return Level.NORMAL


def _loads_of(stored: Any) -> dict[str, float]:
    """Return the loads that devices reported, by incarnation, without what is none."""
    found: dict[str, float] = {}
    for name, one in stored.items() if isinstance(stored, dict) else ():
        with suppress(ValueError):
            found[name.decode()] = float(one.partition(b" ")[0])
    return found
