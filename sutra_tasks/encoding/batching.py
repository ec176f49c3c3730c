"""What the next batch holds: a pure decision over the waiting jobs.

A *job* is what one task submitted: one text or ten thousand. Its texts finish together, so their
order inside the job is free, and they are kept sorted by length.

1. The batch belongs to the oldest job; but a job that one batch finishes goes first once an unfinished
   job's batch has overtaken it. The owner's longest text sets the scale.
2. A job that waits for one text only adds it, if it is of similar length: single texts ride along.
3. Room that is left goes to the owner's other texts of similar length.
4. Room still left goes to the others', oldest first, unless an overtaken job is left out.

Old jobs so finish before new ones begin, and yet a single text that arrives while a 10,000-text job
computes is at most one more batch of that job away from its own. *Similar*: padding stays under
an eighth of the batch, or under 64 tokens in all.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

__all__ = ["Limits", "Plan", "Waiting", "next_batch", "pause_s"]

PADDING_SHARE: Final = 1 / 8
PADDING_TOKENS: Final = 64
"""Padding that is always allowed: it costs less than one more batch."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one batch; ``max_tokens`` counts padding, and one text over it goes alone."""

    max_tokens: int
    max_texts: int
    max_wait_s: float


@dataclass(frozen=True, slots=True)
class Waiting:
    """One job as the plan sees it.

    Attributes:
        lengths: tokens of its waiting texts, ascending, never empty.
        overtaken: a batch of an unfinished job was computed while it waited.
    """

    lengths: Sequence[int]
    overtaken: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """The next batch: its owner, and for each job the slice of its ``lengths`` that is taken."""

    owner: int
    parts: list[range]


def next_batch(jobs: Sequence[Waiting], limits: Limits) -> Plan:
    """Return the next batch, which is never empty.

    ``jobs`` is in order of arrival and not empty.
    """
    owner = next(
        (j for j, job in enumerate(jobs) if job.overtaken and _one_batch(job.lengths, limits)), 0
    )
    longest = jobs[owner].lengths[-1]
    # Only a single text may be longer than the owner's: or singles would split by one token.
    stops = [1 if len(job.lengths) == 1 else bisect_right(job.lengths, longest) for job in jobs]
    taken = [0] * len(jobs)
    taken[owner], count, tokens = 1, 1, longest

    def room_for(j: int) -> bool:
        at = stops[j] - taken[j] - 1
        if at < 0 or count >= limits.max_texts:
            return False
        length = jobs[j].lengths[at]
        return _fits(count + 1, tokens + length, max(longest, length), limits)

    def take(j: int) -> None:
        nonlocal count, tokens, longest
        length = jobs[j].lengths[stops[j] - taken[j] - 1]
        longest = max(longest, length)
        tokens += length
        taken[j] += 1
        count += 1

    others = [j for j in range(len(jobs)) if j != owner]
    for j in sorted(others, key=lambda j: not jobs[j].overtaken):
        if len(jobs[j].lengths) == 1 and room_for(j):
            take(j)
    while room_for(owner):
        take(owner)
    if all(taken[j] or not jobs[j].overtaken for j in others):
        for j in others:
            while room_for(j):
                take(j)
    return Plan(owner, [range(stop - n, stop) for stop, n in zip(stops, taken, strict=True)])


def _fits(texts: int, tokens: int, longest: int, limits: Limits) -> bool:
    """Say whether texts of ``tokens`` in all may share a batch that is padded to ``longest``."""
    padded = texts * longest
    padding = padded - tokens
    return padded <= limits.max_tokens and padding <= max(PADDING_TOKENS, PADDING_SHARE * padded)


def _one_batch(lengths: Sequence[int], limits: Limits) -> bool:
    """Say whether one batch can finish a job."""
    return len(lengths) == 1 or (
        len(lengths) <= limits.max_texts and _fits(len(lengths), sum(lengths), lengths[-1], limits)
    )


def pause_s(
    *, texts: int, tokens: int, oldest_age_s: float, more_arriving: bool, limits: Limits
) -> float:
    """Return how long a batch should still wait for company; 0 means compute now.

    It waits only while more work is known to be on its way and the batch has room for it.
    """
    if not more_arriving or texts >= limits.max_texts or tokens >= limits.max_tokens:
        return 0.0
    return max(0.0, limits.max_wait_s - oldest_age_s)
