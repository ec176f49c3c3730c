"""When a batch of a stream is complete, and how many texts a full batch has.

Pure. A batch is complete when it is full or when its oldest text has waited long enough. The size of a
full batch balances latency against throughput: without a backlog it is the configured size; with a
backlog, or while producers are throttled, it is the size at which this device embeds the most texts a
second, as long as a batch takes no longer than :data:`MOST_BATCH_S`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

__all__ = ["MOST_BATCH_S", "SizeMeasurement", "SizeOptimizer", "should_trigger"]

MOST_BATCH_S: Final = 0.1
"""Seconds that a batch may take: the specification's latency from end to end."""

SMOOTHING: Final = 0.2
"""Weight of the newest batch in the measurement of its size."""

GAIN: Final = 1.05
"""How many times faster a larger size must be to be worth its latency."""

FORGET_S: Final = 30.0
"""Seconds after which a size that was too slow is tried again."""


def should_trigger(size: int, oldest_age_ms: float, *, batch_size: int, max_latency_ms: float) -> bool:
    """Say whether a batch of ``size`` texts is to be computed now; an empty one never is."""
    return size > 0 and (size >= batch_size or oldest_age_ms > max_latency_ms)


@dataclass(frozen=True, slots=True)
class SizeMeasurement:
    """Seconds that batches of one size took: for each text, and for the batch; and when that was."""

    text_s: float
    batch_s: float
    at_s: float


@dataclass(frozen=True, slots=True)
class SizeOptimizer:
    """Climbs the sizes ``least``, twice that, and so on up to ``most``.

    Attributes:
        least: texts in a batch while nothing waits.
        most: texts in the largest batch.
        seen: measurements of each size; a batch counts for the largest size that it fills.
    """

    least: int
    most: int
    seen: Mapping[int, SizeMeasurement] = field(default_factory=dict)

    def measured(self, texts: int, seconds: float, now_s: float) -> SizeOptimizer:
        """Return an optimizer that has seen one more batch, of ``texts`` texts in ``seconds``."""
        size = max((one for one in self.sizes() if one <= texts), default=None)
        if size is None or seconds <= 0:
            return self
        before = self.seen.get(size)
        text_s = seconds / texts
        # For exactly ``size`` texts: the batch may have nearly twice as many.
        batch_s = text_s * size
        if before is not None and now_s - before.at_s < FORGET_S:
            text_s = before.text_s + SMOOTHING * (text_s - before.text_s)
            batch_s = before.batch_s + SMOOTHING * (batch_s - before.batch_s)
        return replace(self, seen={**self.seen, size: SizeMeasurement(text_s, batch_s, now_s)})

    def size(self, now_s: float, *, backlog: bool) -> int:
        """Return the texts a batch should have now.

        Args:
            now_s: seconds of the monotonic clock.
            backlog: whether more texts wait than a batch of the least size holds.
        """
        sizes = self.sizes()
        if not backlog:
            return sizes[0]
        best = sizes[0]
        for size in sizes[1:]:
            smaller, larger = self._recent(best, now_s), self._recent(size, now_s)
            if smaller is None:
                break  # the smaller size has to be measured first
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

    def _recent(self, size: int, now_s: float) -> SizeMeasurement | None:
        found = self.seen.get(size)
        return found if found is not None and now_s - found.at_s < FORGET_S else None
