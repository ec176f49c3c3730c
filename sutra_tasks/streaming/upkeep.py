"""What a device does for its streams besides embedding: measure, report, and look after them in turn."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from sutra_tasks.streaming.backpressure import ACTIONS, next_level
from sutra_tasks.streaming.metrics import MetricsWindow, StreamMetrics, histogram

if TYPE_CHECKING:
    from sutra_tasks.batching.batcher import Batcher
    from sutra_tasks.engines.encoder import Encoder
    from sutra_tasks.settings import Settings
    from sutra_tasks.streaming.store import Server, Stored
    from sutra_tasks.streaming.units import Unit
    from sutra_tasks.vectors import Floats

__all__ = ["Upkeep"]

logger = logging.getLogger(__name__)

TURN_S: Final = 0.2
"""Seconds between two looks at a stream's backlog: a raw producer may go over its limit for so long."""
REPORT_S: Final = 1.0
PRESSED_S: Final = 1.0
"""Seconds for which a look at a stream counts: the next one may be another device's."""
RATE_S: Final = 1.0
"""Seconds over which a rate is taken that tells producers when there should be room."""
TIDY_S: Final = 600.0
CHECK_S: Final = 10.0
"""Seconds between two vectors that are computed once more."""


class Upkeep:
    """Of one device worker; :meth:`step` belongs to one thread."""

    def __init__(
        self,
        server: Server,
        batcher: Batcher,
        options: Settings,
        load: Callable[[], float],
    ) -> None:
        self._server, self._batcher = server, batcher
        self._options, self._load = options, load
        self._lock = threading.Lock()
        self._windows: dict[str, MetricsWindow] = {}
        self._counts: dict[str, int] = {}
        self._rates: dict[str, tuple[int, float, float]] = {}
        self._turned_at = self._reported_at = self._refreshed_at = self._checked_at = -float("inf")
        self._pressed_at: dict[str, float] = {}
        self._tidied_at: dict[str, float] = {}
        self.pause_s = TURN_S / 2

    @property
    def pressed(self) -> bool:
        """Whether larger batches are wanted: a stream was under pressure a moment ago."""
        now = time.monotonic()
        return any(now - at < PRESSED_S for at in tuple(self._pressed_at.values()))

    def claimed(self, stream: str, entries: int) -> None:
        """Count entries that were taken over."""
        self._add(stream, StreamMetrics(claimed=entries))

    def given_up(self, stream: str) -> None:
        """Count an entry that became a dead letter."""
        self._add(stream, StreamMetrics(errors=1))

    def delivered(
        self,
        units: Sequence[Unit],
        first_rows: Floats,
        *,
        formed_at: float,
        compute_s: float,
        stored: Stored | None,
        encoder: Encoder,
    ) -> None:
        """Count units of one stream that were committed; ``first_rows`` are those of the first one."""
        if stored is None or not stored.entries:
            return
        done = [unit for unit in units if unit.chunks and unit.error is None]
        chunks = [(unit, chunk) for unit in done for chunk in unit.chunks]
        overlap = sum(
            max(0, before.end - after.start)
            for unit in done
            for before, after in zip(unit.chunks, unit.chunks[1:], strict=False)
        ) + sum(
            max(0, unit.text.progress.covered - unit.chunks[0].start)
            for unit in done
            if unit.text is not None
        )
        measured = StreamMetrics(
            latency=histogram(max(0.0, stored.at_ms - unit.arrived_ms) for unit, _ in chunks),
            chunk=histogram(1000 * compute_s for _ in chunks),
            formation=histogram(1000 * (formed_at - unit.taken_at) for unit, _ in chunks),
            chunks=len(chunks),
            errors=sum(unit.error is not None for unit in units),
            chars=sum(chunk.end - chunk.start for _, chunk in chunks),
            overlap_chars=overlap,
        )
        self._add(units[0].stream, measured)
        now = time.monotonic()
        if len(first_rows) and now - self._checked_at >= CHECK_S:
            self._checked_at = now
            self._check(encoder, units[0], first_rows[0])

    def step(self, streams: Sequence[str], held: Sequence[Unit]) -> None:
        """Do what is due."""
        now = time.monotonic()
        claim_s = self._options.stream_claim_s
        if now - self._refreshed_at >= claim_s / 4:  # first: it is allowed on a full server
            self._refreshed_at = now
            self._refresh([unit for unit in held if now - unit.taken_at >= claim_s / 4])
        if now - self._turned_at >= TURN_S:
            self._turned_at = now
            load = self._load()
            self._server.say_load(load)
            for stream in streams:
                self._turn(stream, load, now)
        if now - self._reported_at >= REPORT_S and streams:
            self._reported_at = now
            with self._lock:
                totals = {stream: window.total(now) for stream, window in self._windows.items()}
            self._server.report({stream: total.to_json() for stream, total in totals.items()})

    def leave(self) -> None:
        """Report nothing any more."""
        try:
            self._server.leave()
        except Exception as error:  # noqa: BLE001 - it expires
            logger.warning("a stream's consumer left without a word: %s", error)

    def _turn(self, stream: str, load: float, now: float) -> None:
        state = self._server.turn(stream, load)
        if state is None:
            return
        capacity = self._options.stream_buffer_size
        self._server.guard(stream, state, capacity)
        self._server.rest(stream, self._options.stream_idle_flush_s)
        if now - self._tidied_at.get(stream, -TIDY_S) >= TIDY_S:
            self._tidied_at[stream] = now
            self._server.tidy(stream)
        fleet_load = sum(state.loads.values()) / len(state.loads)
        level = next_level(state.size / capacity, fleet_load, state.level)
        per_s = self._rate(stream, now) * len(state.loads)
        self._server.publish(stream, level, state.level, capacity=capacity, load=fleet_load, per_s=per_s)
        if ACTIONS[level].increase_batch_size:
            self._pressed_at[stream] = now

    def _rate(self, stream: str, now: float) -> float:
        """Return this device's vectors a second of late."""
        with self._lock:
            count = self._counts.get(stream, 0)
        before, at, rate = self._rates.get(stream, (count, now, 0.0))
        if now - at >= RATE_S:
            rate = (count - before) / (now - at)
            before, at = count, now
        self._rates[stream] = (before, at, rate)
        return rate

    def _refresh(self, held: Sequence[Unit]) -> None:
        for stream in {unit.stream for unit in held}:
            mine = [unit for unit in held if unit.stream == stream]
            self._server.refresh(
                stream,
                [unit.entry[0] for unit in mine if unit.entry is not None],
                [unit.text for unit in mine if unit.text is not None],
                self._options.stream_claim_s,
            )

    def _check(self, encoder: Encoder, unit: Unit, streamed: Floats) -> None:
        """Embed a chunk once more, by itself, and compare."""
        text = unit.chunks[0].text

        def cosine() -> float:
            row = encoder.encode(encoder.tokenize([text], unit.prompt))[0]
            return float(row @ streamed / max(1e-12, np.linalg.norm(row)))  # streamed has unit length

        def compared(future: Future[Any]) -> None:
            if future.exception() is None:
                found: float = future.result()
                self._add(
                    unit.stream,
                    StreamMetrics(checked=1, consistency_sum=found, consistency_least=found),
                )

        self._batcher.call(cosine).add_done_callback(compared)

    def _add(self, stream: str, measured: StreamMetrics) -> None:
        now = time.monotonic()
        with self._lock:
            self._windows.setdefault(stream, MetricsWindow()).add(measured, now)
            self._counts[stream] = self._counts.get(stream, 0) + measured.chunks
