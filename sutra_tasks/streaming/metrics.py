"""What a device has measured of a stream in the last minute, in a form that adds up over devices.

Pure. Times are counted in buckets 7 % apart, so that percentiles of a fleet are those of all its
devices' values, to half of that, and not a mean of percentiles.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Final

__all__ = ["PERCENTILES", "WINDOW_S", "Measurements", "Percentiles", "Window", "percentiles"]

WINDOW_S: Final = 60
PERCENTILES: Final = (50, 90, 95, 99)
RATIO: Final = 1.07
LEAST_MS: Final = 0.05
MOST: Final = 300
"""Buckets; the last one begins at 8 hours."""

Histogram = Mapping[int, int]
Percentiles = Mapping[int, float]


def bucket(milliseconds: float) -> int:
    """Return the bucket of a time."""
    if milliseconds <= LEAST_MS:
        return 0
    return min(MOST, 1 + int(math.log(milliseconds / LEAST_MS) / math.log(RATIO)))


def middle_ms(number: int) -> float:
    """Return the time that stands for a bucket: the geometric middle of its bounds."""
    return float(LEAST_MS * RATIO ** (number - 0.5)) if number else LEAST_MS


def percentiles(histogram: Histogram) -> Percentiles:
    """Return the percentiles of the specification, in milliseconds; none of nothing."""
    total = sum(histogram.values())
    if not total:
        return {}
    found, seen = {}, 0
    wanted = list(PERCENTILES)
    for number in sorted(histogram):
        seen += histogram[number]
        while wanted and seen >= wanted[0] / 100 * total:
            found[wanted.pop(0)] = round(middle_ms(number), 3)
    return found


@dataclass(frozen=True, slots=True)
class Measurements:
    """Of one stream, in one stretch of time, on one device or many; :meth:`plus` adds them up.

    Attributes:
        latency: milliseconds from an entry's arrival at the server to its vectors in the output.
        chunk: milliseconds the batch took to compute that held it.
        formation: milliseconds a text waited on the device until its batch was handed over.
        chunks: vectors delivered.
        errors: texts that got an error instead.
        claimed: entries taken over from consumers that fell silent.
        chars: characters in the chunks.
        overlap_chars: those of them that are in the chunk before as well.
        checked: vectors that were computed once more, alone.
        consistency_sum: of the cosines between the two.
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
        """Return the share of texts that got an error; 0 of none."""
        total = self.chunks + self.errors
        return self.errors / total if total else 0.0

    @property
    def overlap_ratio(self) -> float:
        """Return the share of characters that are in two chunks; 0 of none."""
        return self.overlap_chars / self.chars if self.chars else 0.0

    @property
    def consistency(self) -> float | None:
        """Return the mean cosine between streamed and batch vectors; None if none was checked."""
        return self.consistency_sum / self.checked if self.checked else None

    def plus(self, other: Measurements) -> Measurements:
        """Return what both have measured."""
        both: dict[str, Any] = {}
        for one in fields(self):
            mine, theirs = getattr(self, one.name), getattr(other, one.name)
            if isinstance(mine, Mapping):
                both[one.name] = {k: mine.get(k, 0) + theirs.get(k, 0) for k in {**mine, **theirs}}
            else:
                both[one.name] = mine + theirs
        both["consistency_least"] = min(self.consistency_least, other.consistency_least)
        return Measurements(**both)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Measurements:
        """Return what :meth:`to_json` gave; what a newer release adds is left out."""
        known = {one.name for one in fields(cls)}
        found = {name: each for name, each in value.items() if name in known}
        for name, each in found.items():
            if isinstance(each, Mapping):
                found[name] = {int(number): count for number, count in each.items()}
        return cls(**found)


class Window:
    """The measurements of the last minute, second by second; for one thread."""

    def __init__(self) -> None:
        self._seconds: deque[tuple[int, Measurements]] = deque()

    def add(self, measured: Measurements, now_s: float) -> None:
        """Count something that happened at ``now_s``, which never goes back."""
        second = int(now_s)
        if self._seconds and self._seconds[-1][0] == second:
            measured = self._seconds.pop()[1].plus(measured)
        self._seconds.append((second, measured))
        self._forget(now_s)

    def total(self, now_s: float) -> Measurements:
        """Return the last minute."""
        self._forget(now_s)
        total = Measurements()
        for _, one in self._seconds:
            total = total.plus(one)
        return total

    def _forget(self, now_s: float) -> None:
        while self._seconds and self._seconds[0][0] <= now_s - WINDOW_S:
            self._seconds.popleft()


def histogram(values_ms: Iterable[float]) -> Histogram:
    """Return times counted by bucket."""
    found: dict[int, int] = {}
    for value in values_ms:
        number = bucket(value)
        found[number] = found.get(number, 0) + 1
    return found


def checked(cosine: float) -> Measurements:
    """Return what one vector that was computed once more has shown."""
    return replace(Measurements(), checked=1, consistency_sum=cosine, consistency_least=cosine)
