"""How long batches take on a device when it is well, by their size: its baseline."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import median
from typing import Final

__all__ = ["BaselineBatchTimes"]

BLOCK: Final = 32
"""The baseline is learned from medians of so many batches of one size: single ones are noise."""

FASTER: Final = 0.8
"""A median under this share of the baseline is faster; one above it may differ by chance."""

FASTER_WEIGHT: Final = 0.25
"""Weight of a faster median in the new baseline."""

FORGET_S: Final = 86_400.0
"""Seconds after which any other median has replaced the baseline."""


@dataclass(slots=True)
class _Size:
    """Batches whose tokens lie between two powers of two; times are seconds / sqrt(tokens)."""

    block: list[float] = field(default_factory=list)
    baseline: float | None = None
    learned_at: float = 0.0


class BaselineBatchTimes:
    """Learns how long batches take on this device when it is well.

    Batches are grouped by powers of two of their tokens. Within a group, time is taken to grow with the
    square root of the tokens, halfway between a fixed cost and a cost per token: whichever holds, that
    is off by a factor of 1.41 at most.

    The first median of 32 batches is the baseline. A median that is faster by a fifth or more replaces a
    quarter of it, because a device warms up. Any other median replaces it over a day: following every
    faster one would end at the fastest ever seen, and following slower ones at once would make a device
    that slowly fails seem well.
    """

    def __init__(self) -> None:
        self._sizes: dict[int, _Size] = {}

    def seconds(self, tokens: int) -> float | None:
        """Return the baseline compute time of a batch; None: too few batches of its size were seen."""
        size = self._sizes.get(tokens.bit_length())
        if size is None or size.baseline is None:
            return None
        return size.baseline * math.sqrt(tokens)

    def learn(self, tokens: int, compute_s: float, now: float) -> None:
        """Learn from one batch."""
        size = self._sizes.setdefault(tokens.bit_length(), _Size())
        size.block.append(compute_s / math.sqrt(max(1, tokens)))
        if len(size.block) < BLOCK:
            return
        found = median(size.block)
        size.block.clear()
        if size.baseline is None:
            size.baseline = found
        else:
            weight = min(1.0, (now - size.learned_at) / FORGET_S)
            if found < FASTER * size.baseline:
                weight = max(weight, FASTER_WEIGHT)
            size.baseline += weight * (found - size.baseline)
        size.learned_at = now
