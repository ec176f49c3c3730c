"""When a batch of a stream is complete, and how large it should be.

Pure. A batch is complete when it is full or when its oldest text has waited long enough. How large
*full* is balances latency against throughput: as long as nothing waits, the configured size; once a
backlog forms, or producers are throttled, the size at which this device is measured to be the most
productive without a batch taking longer than :data:`MOST_BATCH_S`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

__all__ = ["MOST_BATCH_S", "Measured", "SizeOptimizer", "should_trigger"]

MOST_BATCH_S: Final = 0.1
"""The specification's latency end to end: larger batches are not tried beyond it."""

SMOOTHING: Final = 0.2
"""Weight of the newest batch in what a size is believed to take."""

GAIN: Final = 1.05
"""A larger size must be so much faster to be worth its latency."""

FORGET_S: Final = 30.0
"""Seconds after which a size that was too slow is tried again."""


def should_trigger(size: int, oldest_age_ms: float, *, batch_size: int, max_latency_ms: float) -> bool:
    """Say whether a batch of ``size`` texts is to be computed now; an empty one never is."""
    return size > 0 and (size >= batch_size or oldest_age_ms > max_latency_ms)


@dataclass(frozen=True, slots=True)
class Measured:
    """What batches of one size took: seconds for each text, and for a whole batch."""

    text_s: float
    batch_s: float
    at_s: float


@dataclass(frozen=True, slots=True)
class SizeOptimizer:
    """Climbs the sizes ``least``, twice that, and so on up to ``most``.

    Attributes:
        least: texts in a batch while nothing waits.
        most: texts in the largest batch.
        seen: what each size took; a batch counts for the largest size it fills.
    """

    least: int
    most: int
    seen: Mapping[int, Measured] = field(default_factory=dict)

    def measured(self, texts: int, seconds: float, now_s: float) -> SizeOptimizer:
        """Return the optimizer that has seen one more batch."""
        size = max((one for one in self.sizes() if one <= texts), default=None)
        if size is None or seconds <= 0:
            return self
        before = self.seen.get(size)
        text_s = seconds / texts
        # Of the size itself: a batch may hold nearly twice as many texts.
        batch_s = text_s * size
        if before is not None and now_s - before.at_s < FORGET_S:
            text_s = before.text_s + SMOOTHING * (text_s - before.text_s)
            batch_s = before.batch_s + SMOOTHING * (batch_s - before.batch_s)
        return replace(self, seen={**self.seen, size: Measured(text_s, batch_s, now_s)})

    def size(self, now_s: float, *, backlog: bool) -> int:
        """Return the texts a batch should have now.

        Args:
            now_s: seconds that never go back.
            backlog: whether more texts wait than a batch of the least size holds.
        """
        sizes = self.sizes()
        if not backlog:
            return sizes[0]
        best = sizes[0]
        for size in sizes[1:]:
            smaller, larger = self._recent(best, now_s), self._recent(size, now_s)
            if smaller is None:
                break  # what to compare with comes first
            if larger is None:
                return size if 2 * smaller.batch_s <= MOST_BATCH_S else best
            if larger.batch_s > MOST_BATCH_S or larger.text_s * GAIN > smaller.text_s:
                break
            best = size
        return best

    def sizes(self) -> list[int]:
        """Return the sizes that are tried, ascending."""
        found = [min(self.least, self.most)]
        while 2 * found[-1] <= self.most:
            found.append(2 * found[-1])
        return found

    def _recent(self, size: int, now_s: float) -> Measured | None:
        found = self.seen.get(size)
        return found if found is not None and now_s - found.at_s < FORGET_S else None
