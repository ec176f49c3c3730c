"""What the next batch holds, how large it may be, and which of its texts are at fault.

The plan is a pure decision over the waiting jobs. A *job* is what one task submitted: one text or ten
thousand. Its texts finish together, so their order inside the job is free, and they are kept sorted by
length.

1. The batch belongs to the oldest job; but a job that one batch finishes goes first once an unfinished
   job's batch has overtaken it. The owner's longest text sets the scale.
2. A job that waits for one text only adds it, if it is of similar length: single texts ride along.
3. Room that is left goes to the owner's other texts of similar length.
4. Room still left goes to the others', oldest first, unless an overtaken job is left out.
5. A batch is one model's: only jobs of the owner's engine share it.
6. A job that is to be *alone* has its turn like any other, and shares no batch: not its own, not theirs.

Old jobs so finish before new ones begin, and yet a single text that arrives while a 10,000-text job
computes is at most one more batch of that job away from its own. *Similar*: padding stays under
an eighth of the batch, or under 64 tokens in all; an engine that does not pad takes any together.

A batch that fails is halved until the texts at fault stand alone. One that did not fit into memory also
makes the next ones smaller for a while.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np

from sutra_tasks.engines.out_of_memory import is_out_of_memory

if TYPE_CHECKING:
    from sutra_tasks.engines.encoder import TokenizedText
    from sutra_tasks.vectors import Floats

__all__ = [
    "Budget",
    "Job",
    "Limits",
    "Outcome",
    "Plan",
    "Waiting",
    "encode_by_halves",
    "next_batch",
    "pause_s",
    "take",
]

AnyJob = TypeVar("AnyJob", bound="Job")

PADDING_SHARE: Final = 1 / 8
PADDING_TOKENS: Final = 64
"""Padding that is always allowed: it costs less than one more batch."""
REGROWTH_S: Final = 60.0
"""After this time the budget of a device that ran out of memory is doubled."""


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
        alone: it is suspected of ending the workers that compute it, and shares no batch.
        engine: what is to compute it.
        pads: whether that pads a batch's texts to the longest.
    """

    lengths: Sequence[int]
    overtaken: bool
    alone: bool = False
    engine: object = None
    pads: bool = True


@dataclass(frozen=True, slots=True)
class Plan:
    """The next batch: its owner, and for each job the slice of its ``lengths`` that is taken."""

    owner: int
    parts: list[range]


def next_batch(jobs: Sequence[Waiting], limits: Limits) -> Plan:
    """Return the next batch, which is never empty.

    ``jobs`` is in order of arrival and not empty.
    """
    owner = next((j for j, job in enumerate(jobs) if job.overtaken and _one_batch(job, limits)), 0)
    longest, pads = jobs[owner].lengths[-1], jobs[owner].pads
    # Only a single text may be longer than the owner's: or singles would split by one token.
    stops = [1 if len(job.lengths) == 1 else bisect_right(job.lengths, longest) for job in jobs]
    taken = [0] * len(jobs)
    taken[owner], count, tokens = 1, 1, longest

    def room_for(j: int) -> bool:
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

    unshared = jobs[owner].alone
    engine = jobs[owner].engine
    others = [
        j
        for j, job in enumerate(jobs)
        if j != owner and job.engine is engine and not (unshared or job.alone)
    ]
    for j in sorted(others, key=lambda j: not jobs[j].overtaken):
        if len(jobs[j].lengths) == 1 and room_for(j):
            take(j)
    while room_for(owner):
        take(owner)
    if all(
        n or not job.overtaken or job.engine is not engine for n, job in zip(taken, jobs, strict=True)
    ):
        for j in others:
            while room_for(j):
                take(j)
    return Plan(owner, [range(stop - n, stop) for stop, n in zip(stops, taken, strict=True)])


def _fits(texts: int, tokens: int, longest: int, limits: Limits, *, pads: bool) -> bool:
    """Say whether texts of ``tokens`` in all may share a batch, padded to ``longest`` if it is."""
    padded = texts * longest if pads else tokens
    padding = padded - tokens
    return padded <= limits.max_tokens and padding <= max(PADDING_TOKENS, PADDING_SHARE * padded)


def _one_batch(job: Waiting, limits: Limits) -> bool:
    """Say whether one batch can finish a job."""
    texts = len(job.lengths)
    return texts == 1 or (
        texts <= limits.max_texts
        and _fits(texts, sum(job.lengths), job.lengths[-1], limits, pads=job.pads)
    )


@dataclass(slots=True, eq=False, kw_only=True)
class Job:
    """A job with the texts that still wait, sorted by length; ``order[i]`` is where text i stood."""

    texts: list[TokenizedText]
    order: list[int]
    lengths: list[int]
    alone: bool = False
    engine: Any = None
    pads: bool = True
    begun: bool = False
    overtaken: bool = False


def take(jobs: list[AnyJob], limits: Limits) -> list[tuple[AnyJob, TokenizedText, int]]:
    """Take the next batch out of ``jobs``: each text with its job and where it stood there.

    ``jobs`` is as for :func:`next_batch`; those of which nothing waits any more leave it.
    """
    plan = next_batch(
        [Waiting(job.lengths, job.overtaken, job.alone, job.engine, job.pads) for job in jobs], limits
    )
    unfinished = len(plan.parts[plan.owner]) < len(jobs[plan.owner].lengths)
    taken: list[tuple[AnyJob, TokenizedText, int]] = []
    for job, part in zip(jobs, plan.parts, strict=True):
        if not part:
            job.overtaken = job.overtaken or unfinished
            continue
        where = slice(part.start, part.stop)
        taken += [(job, job.texts[i], job.order[i]) for i in part]
        del job.texts[where], job.order[where], job.lengths[where]
        job.begun = True
    jobs[:] = [job for job in jobs if job.lengths]
    return taken


def pause_s(
    *, texts: int, tokens: int, oldest_age_s: float, more_arriving: bool, limits: Limits
) -> float:
    """Return how long a batch should still wait for company; 0 means compute now.

    It waits only while more work is known to be on its way and the batch has room for it.
    """
    if not more_arriving or texts >= limits.max_texts or tokens >= limits.max_tokens:
        return 0.0
    return max(0.0, limits.max_wait_s - oldest_age_s)


@dataclass(frozen=True, slots=True)
class Budget:
    """The limits of a device over time: narrower after it ran out of memory, then doubling again."""

    limits: Limits
    lowered_to: int | None = None
    lowered_at_s: float = 0.0

    def at(self, now_s: float) -> Limits:
        """Return the limits that hold at ``now_s``; they never exceed those configured."""
        if self.lowered_to is None:
            return self.limits
        doublings = min(64, int((now_s - self.lowered_at_s) / REGROWTH_S))  # 64 reach any limit
        return replace(self.limits, max_tokens=min(self.lowered_to << doublings, self.limits.max_tokens))

    def out_of_memory(self, padded_tokens: int, now_s: float) -> Budget:
        """Return what is left after several texts of ``padded_tokens`` together did not fit.

        Half of it: two texts or more were padded to the longest, so that one still fits.
        """
        lowered_to = min(self.at(now_s).max_tokens, max(1, padded_tokens // 2))
        return Budget(self.limits, lowered_to, now_s)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a batch.

    Attributes:
        rows: float32, one for each text; those of failed texts mean nothing.
        errors: why a text has no row, by its index.
        too_large: the fewest padded tokens of several texts that did not fit into memory, if any.
    """

    rows: Floats
    errors: dict[int, Exception]
    too_large: int | None


def encode_by_halves(
    encode: Callable[[Sequence[TokenizedText]], Floats], texts: Sequence[TokenizedText], width: int
) -> Outcome:
    """Encode; where that fails, halve until the texts at fault stand alone."""
    rows = np.zeros((len(texts), width), dtype=np.float32)
    errors: dict[int, Exception] = {}
    too_large: int | None = None
    parts = [range(len(texts))]
    while parts:
        part = parts.pop()
        where = slice(part.start, part.stop)
        try:
            found = encode(texts[where])
            if found.shape != (len(part), width):
                raise ValueError(f"the engine gave rows of shape {found.shape}")  # noqa: TRY301
            rows[where] = found
            continue
        except Exception as error:  # noqa: BLE001 - whatever an engine raises belongs to its texts
            if len(part) == 1:
                # Its frames would keep what the failed pass allocated.
                errors[part.start] = error.with_traceback(None)
                continue
            if is_out_of_memory(error):
                padded = len(part) * max(text.tokens for text in texts[where])
                too_large = padded if too_large is None else min(too_large, padded)
        # Not while the error is handled: it, too, keeps what the failed pass allocated.
        half = len(part) // 2
        parts += [part[half:], part[:half]]
    for index in np.flatnonzero(~np.isfinite(rows).all(axis=1)).tolist():
        errors[index] = FloatingPointError("the vector is not finite")
    return Outcome(rows, errors, too_large)
