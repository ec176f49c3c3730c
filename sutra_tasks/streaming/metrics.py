"""What devices measured of a stream in the last minute, in a form that adds up over devices. Pure.

Times are kept as a DDSketch (Masson, Rim, Lee 2019, https://doi.org/10.14778/3352063.3352135): counts
in buckets whose bounds grow by a constant ratio. Sketches add up, and a percentile of the sum is that of
all values, off by a factor of ``sqrt(RATIO)`` (3.5 %) at most. It is written here because it takes three
functions, and a package for it would be one more dependency of every client.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final

__all__ = ["PERCENTILES", "WINDOW_S", "MetricsWindow", "Percentiles", "StreamMetrics", "percentiles"]

WINDOW_S: Final = 60
PERCENTILES: Final = (50, 90, 95, 99)
RATIO: Final = 1.07
LEAST_MS: Final = 0.05
LAST_BUCKET: Final = 300
"""Begins at 8 hours."""

Histogram = Mapping[int, int]
"""Number of a bucket to how many times are in it."""
Percentiles = Mapping[int, float]
"""Percentile to milliseconds."""


def bucket(milliseconds: float) -> int:
    """Return the bucket of a time."""
    if milliseconds <= LEAST_MS:
        return 0
    return min(LAST_BUCKET, 1 + int(math.log(milliseconds / LEAST_MS, RATIO)))


def middle_ms(number: int) -> float:
    """Return the time that stands for a bucket: the geometric middle of its bounds."""
    return float(LEAST_MS * RATIO ** (number - 0.5)) if number else LEAST_MS


def histogram(values_ms: Iterable[float]) -> Histogram:
    """Count times by bucket."""
    return dict(Counter(map(bucket, values_ms)))


def percentiles(histogram: Histogram) -> Percentiles:
    """Return each of :data:`PERCENTILES` in milliseconds, by nearest rank; nothing for an empty one."""
    total = sum(histogram.values())
    if not total:
        return {}
    found: dict[int, float] = {}
    left = list(PERCENTILES)
    count = 0
    for number in sorted(histogram):
        count += histogram[number]
        while left and count >= left[0] / 100 * total:
            found[left.pop(0)] = round(middle_ms(number), 3)
    return found


@dataclass(frozen=True, slots=True)
class StreamMetrics:
    """Measurements of one stream in one stretch of time, on one device or many.

    Attributes:
        latency: milliseconds from an entry's arrival at the server to its vectors in the output.
        chunk: milliseconds that the batch with the chunk took to compute.
        formation: milliseconds that a text waited on the device until its batch was handed over.
        chunks: vectors delivered.
        errors: texts that got an error instead.
        claimed: entries taken over from consumers that fell silent.
        chars: characters in the chunks.
        overlap_chars: those of them that are in the chunk before as well.
        checked: vectors that were computed once more, alone.
        consistency_sum: sum of the cosines between the two.
        consistency_least: the least of them; 1 if none was checked.
    """

    latency: Histogram = field(default_factory=dict)
    chunk: Histogram = field(default_factory=dict)
    formation: Histogram = field(default_factory=dict)
    chunks: int = 0
    errors: int = 0
    claimed: int = 0
    chars: int = 0
    overlap_chars: int = 0
    checked: int = 0
    consistency_sum: float = 0.0
    consistency_least: float = 1.0

    @property
    def error_rate(self) -> float:
        """Return the share of texts that got an error; 0 without texts."""
        total = self.chunks + self.errors
        return self.errors / total if total else 0.0

    @property
    def overlap_ratio(self) -> float:
        """Return the share of characters that are in two chunks; 0 without chunks."""
        return self.overlap_chars / self.chars if self.chars else 0.0

    @property
    def consistency(self) -> float | None:
        """Return the mean cosine between streamed and batch vectors; None if none was checked."""
        return self.consistency_sum / self.checked if self.checked else None

    def plus(self, other: StreamMetrics) -> StreamMetrics:
        """Add the measurements of another device or another stretch of time."""
        total: dict[str, Any] = {}
        for name in (one.name for one in fields(self)):
            mine, theirs = getattr(self, name), getattr(other, name)
            if isinstance(mine, Mapping):
                total[name] = dict(Counter(mine) + Counter(theirs))
            elif name == "consistency_least":
                total[name] = min(mine, theirs)
            else:
                total[name] = mine + theirs
        return StreamMetrics(**total)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that a device publishes."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> StreamMetrics:
        """Read what :meth:`to_json` returned; fields that a newer release added are ignored."""
        known = {one.name for one in fields(cls)}
        found = {name: each for name, each in value.items() if name in known}
        for name, each in found.items():
            if isinstance(each, Mapping):
                found[name] = {int(number): count for number, count in each.items()}
        return cls(**found)


class MetricsWindow:
    """The metrics of the last minute, by the second; for one thread."""

    def __init__(self) -> None:
        self._seconds: deque[tuple[int, StreamMetrics]] = deque()

    def add(self, metrics: StreamMetrics, now_s: float) -> None:
        """Add what was measured at ``now_s``, which never goes back."""
        second = int(now_s)
        if self._seconds and self._seconds[-1][0] == second:
            metrics = self._seconds.pop()[1].plus(metrics)
        self._seconds.append((second, metrics))
        self._drop_older(now_s)

    def total(self, now_s: float) -> StreamMetrics:
        """Return the sum over the last minute."""
        self._drop_older(now_s)
        total = StreamMetrics()
        for _, metrics in self._seconds:
            total = total.plus(metrics)
        return total

    def _drop_older(self, now_s: float) -> None:
        while self._seconds and self._seconds[0][0] <= now_s - WINDOW_S:
            self._seconds.popleft()
