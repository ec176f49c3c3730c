"""Counts what a device worker does, and compares the times of its batches with their baseline.

A device record carries :meth:`Statistics.summary`; health is judged by :meth:`Statistics.measurements`.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from sutra_tasks.health.baseline import BaselineBatchTimes
from sutra_tasks.health.states import HealthMeasurements

if TYPE_CHECKING:
    from collections.abc import Callable

    from sutra_tasks.batching.jobs import Batch

__all__ = ["Statistics"]

ANSWERS_KEPT: Final = 512
WINDOW_S: Final = 60.0
SLOT_S: Final = 5.0
"""The window moves in steps of so many seconds: a minute of any traffic is a dozen sums."""

SPEED_BATCHES: Final = 64
LEAST_BATCHES: Final = 10
"""The mean time of recent batches counts from so many of them on."""

SMOOTHING: Final = 1 / 32
"""Weight of the newest value in a moving average."""


@dataclass(slots=True)
class _Slot:
    """Sums over a few seconds; the last three only over batches whose baseline time is known."""

    began: float
    texts: int = 0
    errors: int = 0
    batches: int = 0
    compute_s: float = 0.0
    baseline_s: float = 0.0


class Statistics:
    """Counts of one device worker; any thread may write and read them."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with nothing; ``clock`` returns seconds."""
        self._clock = clock
        self._lock = threading.Lock()
        self._counts = {"tasks": 0, "texts": 0, "tokens": 0, "batches": 0, "errors": 0}
        self._busy_s = 0.0
        self._warm_up = (0, 0.0)
        self._speeds: deque[tuple[float, int, float]] = deque(maxlen=SPEED_BATCHES)
        self._slots: deque[_Slot] = deque(maxlen=int(WINDOW_S / SLOT_S))
        self._baseline = BaselineBatchTimes()
        self._average_tokens = self._average_batch_s = 0.0
        self._answers: deque[tuple[float, int, int]] = deque(maxlen=ANSWERS_KEPT)
        self._estimated = self._true = 0
        self._latency_s: float | None = None

    @property
    def batches(self) -> int:
        """Batches computed since the start."""
        return self._counts["batches"]

    def warmed_up(self, tokens: int, compute_s: float) -> None:
        """Begin with another model: its warm-up is the first measurement of its speed.

        Args:
            tokens: true tokens of the warm-up.
            compute_s: seconds that it took.
        """
        with self._lock:
            self._speeds.clear()
            self._slots.clear()
            self._baseline, self._latency_s = BaselineBatchTimes(), None
            self._warm_up = (tokens, compute_s)
            self._average_tokens, self._average_batch_s = float(tokens), compute_s

    def batch(self, batch: Batch, *, by_default_model: bool = True) -> None:
        """Count one batch; only those of the default model count for speed and health."""
        now = self._clock()
        with self._lock:
            counts = self._counts
            counts["batches"] += 1
            counts["texts"] += batch.texts
            counts["tokens"] += batch.tokens
            counts["errors"] += batch.errors
            self._busy_s += batch.compute_s
            if not by_default_model:
                return
            self._speeds.append((now, batch.tokens, batch.compute_s))
            self._average_tokens += SMOOTHING * (batch.tokens - self._average_tokens)
            self._average_batch_s += SMOOTHING * (batch.compute_s - self._average_batch_s)
            slot = self._slot(now)
            slot.texts += batch.texts
            slot.errors += batch.errors
            if batch.errors or batch.retried:  # computed in halves: its time is not that of its size
                return
            baseline_s = self._baseline.seconds(batch.tokens)
            if baseline_s is not None:
                slot.batches += 1
                slot.compute_s += batch.compute_s
                slot.baseline_s += baseline_s
            self._baseline.learn(batch.tokens, batch.compute_s, now)

    def answer(self, seconds: float, *, compute_s: float, estimated_tokens: int, tokens: int) -> None:
        """Count one answered call.

        Args:
            seconds: how long it was in this worker, waiting included.
            compute_s: how long the batches with its texts took.
            estimated_tokens: its tokens as :class:`~sutra_tasks.client.call.Demand` estimates them.
            tokens: its true tokens.
        """
        with self._lock:
            self._counts["tasks"] += 1
            if len(self._answers) == ANSWERS_KEPT:
                _, estimated, true = self._answers[0]  # the oldest, which the append below drops
                self._estimated -= estimated
                self._true -= true
            self._answers.append((seconds, estimated_tokens, tokens))
            self._estimated += estimated_tokens
            self._true += tokens
            if not tokens:  # no texts: nothing was computed
                return
            before_s = compute_s if self._latency_s is None else self._latency_s
            self._latency_s = before_s + SMOOTHING * (compute_s - before_s)

    def summary(self) -> dict[str, Any]:
        """Return the fields of a device record.

        ``tasks``, ``texts``, ``tokens``, ``batches``, ``errors`` and ``busy_s`` count from the start.
        ``p50_ms`` and ``p95_ms`` are of the last 512 calls, waiting included; 0.0 before the first.
        The fields below are None while nothing was measured. Their tokens are estimated ones, by the
        ratio of estimated to true tokens of those calls:

        - ``tokens_per_s``: per second of computing, over the last 64 batches and 60 s. The warm-up
          counts as one more batch: after a pause there is no other, and it keeps a few tiny batches
          from passing for a slow device.
        - ``latency_s``: moving average over calls of the time of their batches.
        - ``latency_per_token_s``: moving average over batches, weighted by their tokens.
        """
        now = self._clock()
        with self._lock:
            counts, busy_s, latency_s = dict(self._counts), self._busy_s, self._latency_s
            answers, speeds = list(self._answers), list(self._speeds)
            ratio = self._estimated / self._true if self._true else 1.0
            tokens, compute_s = self._warm_up
            average_tokens, average_batch_s = self._average_tokens, self._average_batch_s
        for at, batch_tokens, batch_s in speeds:
            if now - at <= WINDOW_S:
                tokens += batch_tokens
                compute_s += batch_s
        recent = sorted(seconds for seconds, _, _ in answers)
        return {
            **counts,
            "busy_s": round(busy_s, 4),
            "p50_ms": round(1000 * recent[len(recent) // 2], 2) if recent else 0.0,
            "p95_ms": round(1000 * recent[int(len(recent) * 0.95)], 2) if recent else 0.0,
            "tokens_per_s": ratio * tokens / compute_s if compute_s > 0 else None,
            "latency_s": latency_s,
            "latency_per_token_s": (
                average_batch_s / (ratio * average_tokens) if average_tokens > 0 else None
            ),
        }

    def measurements(self, memory_share: float | None) -> HealthMeasurements:
        """Return the measurements of the last minute, by which health is judged."""
        now = self._clock()
        with self._lock:
            recent = [slot for slot in self._slots if now - slot.began <= WINDOW_S]
            texts, errors = sum(slot.texts for slot in recent), sum(slot.errors for slot in recent)
            batches = sum(slot.batches for slot in recent)
            compute_s = sum(slot.compute_s for slot in recent)
            baseline_s = sum(slot.baseline_s for slot in recent)
        known = batches >= LEAST_BATCHES
        return HealthMeasurements(
            recent_latency_s=compute_s / batches if known else None,
            baseline_latency_s=baseline_s / batches if known else None,
            recent_texts=texts,
            recent_errors=errors,
            memory_share=memory_share,
        )

    def _slot(self, now: float) -> _Slot:
        if not self._slots or now - self._slots[-1].began >= SLOT_S:
            self._slots.append(_Slot(now))
        return self._slots[-1]
