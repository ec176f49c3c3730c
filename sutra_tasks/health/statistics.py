"""What a device worker has done so far, and how its batches compare with what is usual for it.

Seconds of the past are those of the clock given at construction; a device record carries the result of
:meth:`Statistics.summary`.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any, Final

from sutra_tasks.health.states import Measurements

if TYPE_CHECKING:
    from sutra_tasks.batching.batcher import Batch

__all__ = ["Statistics", "Usual"]

ANSWERS_KEPT: Final = 512
WINDOW_S: Final = 60.0
SLOT_S: Final = 5.0
"""The window moves in steps of this, so that a minute of any traffic is a dozen sums."""

SPEED_BATCHES: Final = 64
LEAST_BATCHES: Final = 10
"""Recent batches from which on their mean time says something."""

SMOOTHING: Final = 1 / 32
"""Weight of the newest value in a moving average."""

BLOCK: Final = 32
"""Batches of one size whose median is learned from: single ones are noise."""

FASTER: Final = 0.8
"""Share of the usual time under which batches became faster; above it, medians differ by chance."""

DOWNWARD: Final = 0.25
"""How far what is usual follows a faster median."""

FORGET_S: Final = 86_400.0
"""Seconds after which another time counts as usual."""


@dataclass(slots=True)
class _Size:
    """Batches of one power of two of tokens, each as seconds over the root of its tokens."""

    block: list[float] = field(default_factory=list)
    usual: float | None = None
    learned_at: float = 0.0


class Usual:
    """How long batches usually take on this device, by their size.

    Sizes are powers of two of tokens. Within one, time is taken to grow with the root of the tokens,
    halfway between a fixed cost and a cost per token: whichever holds, that is off by 1.41 at most.
    The first median of 32 batches is what is usual. Medians faster by a fifth and more are followed
    quickly, for a device warms up; any others over a day: following every faster one would end at the
    fastest ever seen, and following slower ones would make a device that fails slowly seem well.
    """

    def __init__(self) -> None:
        self._sizes: dict[int, _Size] = {}

    def seconds(self, tokens: int) -> float | None:
        """Return the usual compute time of a batch; None if too few of its size were seen."""
        size = self._sizes.get(tokens.bit_length())
        return None if size is None or size.usual is None else size.usual * math.sqrt(tokens)

    def learn(self, tokens: int, compute_s: float, now: float) -> None:
        """Take note of one batch."""
        size = self._sizes.setdefault(tokens.bit_length(), _Size())
        size.block.append(compute_s / math.sqrt(max(1, tokens)))
        if len(size.block) < BLOCK:
            return
        found = median(size.block)
        size.block.clear()
        if size.usual is None:
            size.usual = found
        else:
            slowly = min(1.0, (now - size.learned_at) / FORGET_S)
            weight = max(slowly, DOWNWARD) if found < FASTER * size.usual else slowly
            size.usual += weight * (found - size.usual)
        size.learned_at = now


@dataclass(slots=True)
class _Slot:
    """Sums over a few seconds; the last three only of batches whose usual time is known."""

    began: float
    texts: int = 0
    errors: int = 0
    batches: int = 0
    compute_s: float = 0.0
    usual_s: float = 0.0


class Statistics:
    """What this worker has done; written by its threads, read by the heartbeat."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._counts = {"tasks": 0, "texts": 0, "tokens": 0, "batches": 0, "errors": 0}
        self._busy_s = 0.0
        self._warm_up = (0, 0.0)
        self._speeds: deque[tuple[float, int, float]] = deque(maxlen=SPEED_BATCHES)
        self._slots: deque[_Slot] = deque(maxlen=int(WINDOW_S / SLOT_S))
        self._usual = Usual()
        self._average_tokens = self._average_batch_s = 0.0
        self._answers: deque[tuple[float, int, int]] = deque(maxlen=ANSWERS_KEPT)
        self._estimated = self._true = 0
        self._latency_s: float | None = None

    @property
    def batches(self) -> int:
        """Batches computed since the start: when it stands still, so does the device."""
        return self._counts["batches"]

    def warmed_up(self, tokens: int, compute_s: float) -> None:
        """Take a model's warm-up as the first measurement of its speed; ``tokens`` are true ones.

        What was usual with the model before it is forgotten.
        """
        with self._lock:
            self._speeds.clear()
            self._slots.clear()
            self._usual, self._latency_s = Usual(), None
            self._warm_up = (tokens, compute_s)
            self._average_tokens, self._average_batch_s = float(tokens), compute_s

    def batch(self, batch: Batch, *, usual: bool = True) -> None:
        """Count one batch; speed and health learn of it if it is of the ``usual`` model."""
        now = self._clock()
        with self._lock:
            counts = self._counts
            counts["batches"] += 1
            counts["texts"] += batch.texts
            counts["tokens"] += batch.tokens
            counts["errors"] += batch.errors
            self._busy_s += batch.compute_s
            if not usual:
                return
            self._speeds.append((now, batch.tokens, batch.compute_s))
            self._average_tokens += SMOOTHING * (batch.tokens - self._average_tokens)
            self._average_batch_s += SMOOTHING * (batch.compute_s - self._average_batch_s)
            slot = self._slot(now)
            slot.texts += batch.texts
            slot.errors += batch.errors
            if batch.errors or batch.retried:  # halved: its time is not that of its size
                return
            usual_s = self._usual.seconds(batch.tokens)
            if usual_s is not None:
                slot.batches += 1
                slot.compute_s += batch.compute_s
                slot.usual_s += usual_s
            self._usual.learn(batch.tokens, batch.compute_s, now)

    def answer(self, seconds: float, *, compute_s: float, estimated_tokens: int, tokens: int) -> None:
        """Count one answered request.

        Args:
            seconds: how long it was in this worker, waiting included.
            compute_s: how long the batches that held its texts took.
            estimated_tokens: its tokens as :class:`~sutra_tasks.client.call.Demand` estimates them.
            tokens: its tokens.
        """
        with self._lock:
            self._counts["tasks"] += 1
            if len(self._answers) == ANSWERS_KEPT:
                _, estimated, true = self._answers[0]  # which the next line pushes out
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
        ``p50_ms`` and ``p95_ms`` are of the last 512 requests, waiting included; 0.0 before the first.
        The others are None while nothing was measured; their tokens are estimated ones, by the ratio
        of estimated to true tokens of those requests:

        - ``tokens_per_s``: of compute time, over the last 64 batches and 60 s. The warm-up counts as
          one more batch: it is all there is after a rest, and keeps a few tiny batches from passing
          for a slow device.
        - ``latency_s``: moving average over requests of the time of the batches that held them.
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

    def measurements(self, memory_share: float | None) -> Measurements:
        """Return what health is judged by: the last minute, and how its batches usually go."""
        now = self._clock()
        with self._lock:
            recent = [slot for slot in self._slots if now - slot.began <= WINDOW_S]
            texts, errors = sum(slot.texts for slot in recent), sum(slot.errors for slot in recent)
            batches = sum(slot.batches for slot in recent)
            compute_s = sum(slot.compute_s for slot in recent)
            usual_s = sum(slot.usual_s for slot in recent)
        known = batches >= LEAST_BATCHES
        return Measurements(
            recent_latency_s=compute_s / batches if known else None,
            baseline_latency_s=usual_s / batches if known else None,
            recent_texts=texts,
            recent_errors=errors,
            memory_share=memory_share,
        )

    def _slot(self, now: float) -> _Slot:
        if not self._slots or now - self._slots[-1].began >= SLOT_S:
            self._slots.append(_Slot(now))
        return self._slots[-1]
