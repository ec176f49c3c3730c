"""Recording what a device measures of its streams."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from sutra_tasks.streaming.metrics import MetricsWindow, StreamMetrics, histogram

if TYPE_CHECKING:
    from sutra_tasks.batching.batcher import Batcher
    from sutra_tasks.engines.encoder import Encoder
    from sutra_tasks.streaming.consumer.items import StreamItem
    from sutra_tasks.streaming.consumer.shared_state import StreamBatch
    from sutra_tasks.streaming.delivered import CommitResult
    from sutra_tasks.vectors import Floats

__all__ = ["Recorder"]

RATE_S: Final = 1.0
"""Seconds over which a rate is taken; from it producers learn when to try again."""
CHECK_S: Final = 10.0
"""Seconds between two vectors that are computed once more, to compare them."""


class Recorder:
    """Measurements of the last minute for each stream; safe to use from many threads."""

    def __init__(self, batcher: Batcher) -> None:
        """Begin with nothing; ``batcher`` computes vectors once more, to compare them."""
        self._batcher = batcher
        self._lock = threading.Lock()
        self._windows: dict[str, MetricsWindow] = {}
        self._counts: dict[str, int] = {}
        self._rates: dict[str, tuple[int, float, float]] = {}
        self._checked_at = -float("inf")

    def claimed(self, stream: str, entries: int) -> None:
        """Count entries that were claimed."""
        self.add(stream, StreamMetrics(claimed=entries))

    def dead_lettered(self, stream: str) -> None:
        """Count an entry that became a dead letter."""
        self.add(stream, StreamMetrics(errors=1))

    def committed(
        self,
        items: Sequence[StreamItem],
        first_rows: Floats,
        batch: StreamBatch,
        compute_s: float,
        result: CommitResult | None,
    ) -> None:
        """Count items of one stream that were committed together.

        Args:
            items: the items.
            first_rows: the vectors of the first one, of unit length, shape (chunks, width).
            batch: that they were computed in.
            compute_s: seconds it took.
            result: the server's answer; nothing is counted if this commit answered no entry.
        """
        if result is None or not result.entries:
            return
        self.add(items[0].stream, _measured(items, batch.formed_at, compute_s, result.at_ms))
        now = time.monotonic()
        if len(first_rows) and now - self._checked_at >= CHECK_S:
            self._checked_at = now
            self._check(batch.tokenizer.encoder, items[0], first_rows[0])

    def report(self, now: float) -> dict[str, Any]:
        """Return the measurements of the last minute, by stream, as JSON objects."""
        with self._lock:
            totals = {stream: window.total(now) for stream, window in self._windows.items()}
        return {stream: total.to_json() for stream, total in totals.items()}

    def rate(self, stream: str, now: float) -> float:
        """Return this device's vectors a second of late."""
        with self._lock:
            count = self._counts.get(stream, 0)
            before, at, per_s = self._rates.get(stream, (count, now, 0.0))
            if now - at >= RATE_S:
                per_s = (count - before) / (now - at)
                before, at = count, now
            self._rates[stream] = (before, at, per_s)
        return per_s

    def add(self, stream: str, measured: StreamMetrics) -> None:
        """Add what was measured at this moment."""
        now = time.monotonic()
        with self._lock:
            self._windows.setdefault(stream, MetricsWindow()).add(measured, now)
            self._counts[stream] = self._counts.get(stream, 0) + measured.chunks

    def _check(self, encoder: Encoder, item: StreamItem, streamed: Floats) -> None:
        """Embed a chunk once more, alone, and compare the vectors."""
        text = item.chunks[0].text

        def cosine() -> float:
            row = encoder.encode(encoder.tokenize([text], item.prompt))[0]
            return float(row @ streamed / max(1e-12, np.linalg.norm(row)))  # streamed has unit length

        def compared(future: Future[Any]) -> None:
            if future.exception() is None:
                found: float = future.result()
                self.add(
                    item.stream,
                    StreamMetrics(checked=1, consistency_sum=found, consistency_least=found),
                )

        self._batcher.call(cosine).add_done_callback(compared)


def _measured(
    items: Sequence[StreamItem], formed_at: float, compute_s: float, committed_ms: float
) -> StreamMetrics:
    done = [item for item in items if item.chunks and item.error is None]
    chunks = [(item, chunk) for item in done for chunk in item.chunks]
    overlap = sum(
        max(0, before.end - after.start) for item in done for before, after in pairwise(item.chunks)
    ) + sum(
        max(0, item.text.progress.covered - item.chunks[0].start)
        for item in done
        if item.text is not None
    )
    return StreamMetrics(
        latency=histogram(max(0.0, committed_ms - item.arrived_ms) for item, _ in chunks),
        chunk=histogram(1000 * compute_s for _ in chunks),
        formation=histogram(1000 * (formed_at - item.taken_at) for item, _ in chunks),
        chunks=len(chunks),
        errors=sum(item.error is not None for item in items),
        chars=sum(chunk.end - chunk.start for _, chunk in chunks),
        overlap_chars=overlap,
    )
