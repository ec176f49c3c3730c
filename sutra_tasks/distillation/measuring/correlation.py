"""Spearman's rank correlation of the similarities of pairs of texts, teacher against student."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sutra_tasks.distillation.measuring.bootstrap import REPEATS, Interval, percentile_interval
from sutra_tasks.distillation.measuring.ranking import row_products, unit

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sutra_tasks.distillation.measuring.ranking import Indices, Values
    from sutra_tasks.vectors import Floats

__all__ = ["draw_pairs", "ranks", "spearman", "spearman_interval"]


def ranks(order: NDArray[np.intp], weights: Values) -> Values:
    """Return the rank of each value, counted from 1; equal values share their mean rank. Shape (n,).

    Args:
        order: index of each value among the sorted distinct ones, as ``np.unique`` gives the inverse.
        weights: how often each value occurs.
    """
    size = np.bincount(order, weights)
    ranked: Values = (np.cumsum(size) - size + (size + 1) / 2)[order]
    return ranked


def draw_pairs(n: int, most: int, rng: np.random.Generator) -> Indices:
    """Return pairs of different indices below ``n``, shape (pairs, 2): all, or ``most`` random ones."""
    if n * (n - 1) // 2 <= most:
        return np.stack(np.triu_indices(n, 1), axis=1).astype(np.int64)
    first = rng.integers(n, size=most)
    return np.stack([first, (first + rng.integers(1, n, size=most)) % n], axis=1)


def spearman(a: Floats, b: Floats, pairs: Indices) -> float:
    """Return the rank correlation of the pairs' cosines in ``a`` and ``b``; 0 without variance."""
    one, other = (_groups(rows, pairs) for rows in (a, b))
    return _correlation(one, other, np.ones(len(pairs)))


def spearman_interval(
    a: Floats, b: Floats, pairs: Indices, *, rng: np.random.Generator, repeats: int = REPEATS
) -> Interval:
    """Return :func:`spearman` with an interval from resampled texts.

    A pair counts as often as its two texts were drawn, multiplied; so few pairs widen the interval.
    """
    n = len(a)
    one, other = (_groups(rows, pairs) for rows in (a, b))
    found = np.empty(repeats)
    for repeat in range(repeats):
        counts = np.bincount(rng.integers(n, size=n), minlength=n).astype(np.float64)
        found[repeat] = _correlation(one, other, counts[pairs[:, 0]] * counts[pairs[:, 1]])
    return percentile_interval(_correlation(one, other, np.ones(len(pairs))), found, 0.95)


def _groups(rows: Floats, pairs: Indices) -> NDArray[np.intp]:
    rows = unit(rows)
    blocks = np.array_split(pairs, max(1, len(pairs) // 8_192))
    found = [row_products(rows[some[:, 0]], rows[some[:, 1]]) for some in blocks]
    # Closer similarities differ by rounding only: they share a rank.
    rounded = np.round(np.concatenate(found), 6)
    groups: NDArray[np.intp] = np.unique(rounded, return_inverse=True)[1]
    return groups


def _correlation(one: NDArray[np.intp], other: NDArray[np.intp], weights: Values) -> float:
    total = weights.sum()
    if not total:
        return np.nan
    x, y = ranks(one, weights), ranks(other, weights)
    # Not as matrix products: the vectors are too short for the threads of a BLAS, which wake slowly.
    x -= (weights * x).sum() / total
    y -= (weights * y).sum() / total
    spread = np.sqrt((weights * x * x).sum() * (weights * y * y).sum())
    return float((weights * x * y).sum() / spread) if spread else 0.0
