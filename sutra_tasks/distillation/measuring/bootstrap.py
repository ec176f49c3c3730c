"""Confidence intervals of a figure, by resampling the texts or queries that it was measured on.

Never by resampling pairs of texts: pairs that share a text are not independent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from sutra_tasks.distillation.measuring.ranking import Values

__all__ = ["REPEATS", "Interval", "bootstrap", "percentile_interval", "ratio_of_means"]

REPEATS: Final = 1_000
"""Resamples of each figure."""
BLOCK_DRAWS: Final = 1_000_000
"""Values drawn at a time: 8 MB."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure and the bounds of its confidence interval, of 95% unless stated otherwise."""

    value: float
    low: float
    high: float


def bootstrap(
    values: Values,
    statistic: Callable[[Values], Values] | None = None,
    *,
    rng: np.random.Generator,
    repeats: int = REPEATS,
    share: float = 0.95,
) -> Interval:
    """Return a statistic and its percentile bootstrap interval (Efron and Tibshirani, 1993, ch. 13).

    Args:
        values: one for each text or query, shape (n, ...), n at least 1.
        statistic: gives one number for each sample of an array of shape (samples, n, ...); None: the
            mean.
        rng: draws the resamples.
        repeats: number of resamples.
        share: confidence of the interval.

    Raises:
        ValueError: there are no values.
    """
    n = len(values)
    if not n:
        raise ValueError("there is nothing to measure")
    of: Callable[[Values], Any] = statistic or partial(np.mean, axis=1)
    block = max(1, BLOCK_DRAWS // n)
    found = [
        of(values[rng.integers(n, size=(min(block, repeats - start), n))])
        for start in range(0, repeats, block)
    ]
    return percentile_interval(float(of(values[None])[0]), np.concatenate(found), share)


def ratio_of_means(
    teacher: Values, student: Values, *, rng: np.random.Generator, repeats: int = REPEATS
) -> Interval | None:
    """Return the student's mean divided by the teacher's, with an interval from resampled queries.

    Each resample has the same queries of both.

    Args:
        teacher: a value for each query.
        student: a value for each query.
        rng: draws the resamples.
        repeats: number of resamples.

    Returns:
        None if the teacher's mean is 0.
    """
    if not teacher.mean():
        return None
    return bootstrap(np.stack([student, teacher], axis=1), _ratio, rng=rng, repeats=repeats)


def percentile_interval(value: float, found: Values, share: float) -> Interval:
    """Return a figure with the interval that holds a ``share`` of its resampled values."""
    low, high = np.nanpercentile(found, [50 * (1 - share), 50 * (1 + share)])
    return Interval(value, float(low), float(high))


def _ratio(samples: Values) -> Values:
    ours, theirs = samples.mean(axis=1).T
    # NaN for a resample in which the teacher finds nothing: it is left out of the interval.
    ratios: Values = np.divide(ours, theirs, out=np.full(len(ours), np.nan), where=theirs > 0)
    return ratios
