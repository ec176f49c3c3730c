"""Decides which rows the next batch has, and how long it waits for more.

A pure decision over the waiting jobs. A job is what one task submitted: one text or ten thousand. Its
texts finish together, so their order inside the job is free, and they are kept sorted by length.

1. The batch belongs to the oldest job; but a job that one batch finishes goes first once an unfinished
   job's batch has overtaken it. The owner's longest text sets the scale.
2. A job that waits for one text only adds it, if it is of similar length.
3. Space that is left goes to the owner's other texts of similar length.
4. Space still left goes to the other jobs, oldest first, unless an overtaken job is left out.
5. A batch is one model's: only jobs of the owner's encoder share it.

Old jobs so finish before new ones begin, and yet a single text that arrives while a 10,000-text job
computes is at most one more batch of that job away from its own. *Similar*: padding stays under
an eighth of the batch, or under 64 tokens in all; an engine that does not pad takes any together.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from sutra_tasks.batching.jobs import BatchRow, Job

__all__ = ["Limits", "Selection", "next_batch", "pause_s", "take_batch"]

PADDING_SHARE: Final = 1 / 8
PADDING_TOKENS: Final = 64
"""Padding that is always allowed: it costs less than one more batch."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one batch; ``max_tokens`` counts padding, and one text over it goes alone."""

    max_tokens: int
    max_texts: int
    max_wait_s: float

    def are_reached(self, texts: int, tokens: int) -> bool:
        """Return whether a batch has no space for more texts."""
        return texts >= self.max_texts or tokens >= self.max_tokens


@dataclass(frozen=True, slots=True)
class Selection:
    """The next batch: the index of the job that owns it, and the slice of each job's ``lengths``."""

    owner: int
    slices: list[range]


def next_batch(jobs: Sequence[Job], limits: Limits) -> Selection:
    """Return the next batch, which is never empty.

    Args:
        jobs: those that wait, in order of arrival; at least one, and each with a text.
        limits: bounds of the batch.
    """
    owner = next((j for j, job in enumerate(jobs) if job.overtaken and _one_batch(job, limits)), 0)
    longest, encoder, pads = jobs[owner].lengths[-1], jobs[owner].encoder, _pads(jobs[owner])
    # Only a single text may be longer than the owner's: or singles would split by one token.
    stops = [1 if len(job.lengths) == 1 else bisect_right(job.lengths, longest) for job in jobs]
    taken = [0] * len(jobs)
    taken[owner], count, tokens = 1, 1, longest

    def fits(j: int) -> bool:
        at = stops[j] - taken[j] - 1
        if at < 0 or count >= limits.max_texts:
            return False
        length = jobs[j].lengths[at]
        return _fits(count + 1, tokens + length, max(longest, length), limits, pads=pads)

    def take(j: int) -> None:
        nonlocal count, tokens, longest
        length = jobs[j].lengths[stops[j] - taken[j] - 1]
        longest = max(longest, length)
        tokens += length
        taken[j] += 1
        count += 1

    others = [j for j, job in enumerate(jobs) if j != owner and job.encoder is encoder]
    for j in sorted(others, key=lambda j: not jobs[j].overtaken):
        if len(jobs[j].lengths) == 1 and fits(j):
            take(j)
    while fits(owner):
        take(owner)
    if all(taken[j] or not jobs[j].overtaken for j in others):
        for j in others:
            while fits(j):
                take(j)
    return Selection(owner, [range(stop - n, stop) for stop, n in zip(stops, taken, strict=True)])


def take_batch(jobs: list[Job], limits: Limits) -> list[BatchRow]:
    """Take the rows of the next batch out of ``jobs``; jobs of which no text waits any more leave it.

    Args:
        jobs: as for :func:`next_batch`.
        limits: bounds of the batch.
    """
    selection = next_batch(jobs, limits)
    unfinished = len(selection.slices[selection.owner]) < len(jobs[selection.owner].lengths)
    rows: list[BatchRow] = []
    for job, where in zip(jobs, selection.slices, strict=True):
        if where:
            rows += job.take(where)
        elif unfinished:
            job.overtaken = True
    jobs[:] = [job for job in jobs if job.lengths]
    return rows


def pause_s(
    *, texts: int, tokens: int, oldest_age_s: float, more_announced: bool, limits: Limits
) -> float:
    """Return how many seconds a batch should still wait for more rows; 0 means compute now.

    It waits only while another job was announced and the batch has space for it.
    """
    if not more_announced or limits.are_reached(texts, tokens):
        return 0.0
    return max(0.0, limits.max_wait_s - oldest_age_s)


def _pads(job: Job) -> bool:
    """Return whether the engine of a job pads a batch's texts to the longest."""
    return not job.encoder.info.is_static


def _fits(texts: int, tokens: int, longest: int, limits: Limits, *, pads: bool) -> bool:
    """Return whether texts of ``tokens`` in all may share a batch, padded to ``longest`` if it is."""
    padded = texts * longest if pads else tokens
    padding = padded - tokens
    return padded <= limits.max_tokens and padding <= max(PADDING_TOKENS, PADDING_SHARE * padded)


def _one_batch(job: Job, limits: Limits) -> bool:
    """Return whether one batch can finish a job."""
    texts = len(job.lengths)
    return texts == 1 or (
        texts <= limits.max_texts
        and _fits(texts, sum(job.lengths), job.lengths[-1], limits, pads=_pads(job))
    )
