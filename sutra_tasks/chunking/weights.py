"""How much the vector of each chunk counts, and the one vector that they make together.

Weights are arithmetic over spans of tokens: one float64 for each chunk, and they add up to 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sutra_tasks.vectors import Floats

__all__ = ["METHODS", "Spans", "Weights", "aggregate", "chunk_weights"]

Spans = Sequence[tuple[int, int]]
"""Chunks as spans of tokens, in order, not empty; they cover ``[0, end of the last)``."""

Weights = NDArray[np.float64]

LEAST_NORM: Final = 1e-6
"""Below this norm the sum of unit vectors in float32 is rounding error without a direction."""


def mean(spans: Spans, *, seed_exact: bool) -> Weights:  # noqa: ARG001 - the same either way
    """Weigh every chunk alike."""
    return np.full(len(spans), 1 / len(spans))


def positional(spans: Spans, *, seed_exact: bool) -> Weights:
    """Weigh the middle of a text most: ``1 - |x - n/2| / (n/2)``.

    The specification's formula, taken at the midpoint of each chunk, ``x = i + 1/2``: taken at ``i``, as
    ``seed_exact`` does, one chunk alone weighs nothing, and so does the first of several.
    """
    n = len(spans)
    at = np.arange(n) + (0.0 if seed_exact else 0.5)
    return _normalized(1 - np.abs(at - n / 2) / (n / 2))


def overlap_aware(spans: Spans, *, seed_exact: bool) -> Weights:
    """Weigh a chunk by the tokens that it does not share.

    The weight is the sum over its tokens of ``1 / (chunks that hold the token)``, so that every token of
    the text counts once; with ``seed_exact`` the specification's share of tokens that no other holds.
    """
    cover = np.zeros(spans[-1][1] + 1)
    for start, end in spans:
        cover[start] += 1
        cover[end] -= 1
    cover = np.cumsum(cover)[:-1]
    if seed_exact:
        return _normalized(np.array([np.mean(cover[start:end] == 1) for start, end in spans]))
    until = np.concatenate([[0.0], np.cumsum(1 / cover)])
    return _normalized(np.array([until[end] - until[start] for start, end in spans]))


METHODS: Final[Mapping[str, Callable[..., Weights]]] = {
    "overlap_aware": overlap_aware,
    "mean": mean,
    "positional": positional,
    "max": mean,
}
"""``max`` takes the largest of each element; its weights say that every chunk counts alike."""


def chunk_weights(spans: Spans, method: str, *, seed_exact: bool = False) -> Weights:
    """Return the weights of chunks under ``method``, a name in :data:`METHODS`.

    Args:
        spans: the chunks.
        method: how to weigh them.
        seed_exact: the specification's formulas to the letter, for audits.
    """
    return METHODS[method](spans, seed_exact=seed_exact)


def aggregate(rows: Floats, weights: Weights, method: str) -> Floats:
    """Return one vector for a text from its chunks': float32, shape (width,), not normalised.

    Each row is brought to unit length first, so that no chunk counts by its vector's length.

    Args:
        rows: float32 vectors of the chunks, shape (chunks, width).
        weights: from :func:`chunk_weights`.
        method: its name; ``max`` takes the largest of each element.

    Raises:
        ValueError: a row, or what they add up to, has no direction.
    """
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    if not (norms.all() and np.isfinite(norms).all()):
        raise ValueError("the vector of a chunk is zero, or not finite")
    unit = rows / norms
    if method == "max":
        one: Floats = unit.max(axis=0)
    else:
        one = weights.astype(np.float32) @ unit
    if not np.linalg.norm(one) > LEAST_NORM:
        raise ValueError("the vectors of its chunks cancel out")
    return one


def _normalized(weights: Weights) -> Weights:
    total = weights.sum()
    # The specification's formulas give zeros only for some texts.
    return weights / total if total > 0 else np.full(len(weights), 1 / len(weights))
