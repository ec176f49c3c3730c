"""Who is nearest to whom: neighbours, and how well a ranking puts the right documents first.

Similarities are taken in blocks of rows, so that 5,000 texts among 5,000 need some 50 MB.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from sutra_tasks.vectors import finish

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sutra_tasks.vectors import Floats

__all__ = [
    "Indices",
    "Values",
    "ndcg",
    "neighbour_overlap",
    "neighbours",
    "padded",
    "ranking_ndcg",
    "unit",
]

Values = NDArray[np.float64]
Indices = NDArray[np.int64]

K: Final = 10
BLOCK_ROWS: Final = 512
TIE: Final = 1e-6
"""Similarities so close are rounding apart: which comes first says nothing."""


def unit(rows: Floats) -> Floats:
    """Return rows as float32 of unit length; a row of zeros stays zero."""
    return finish(rows.astype(np.float32, copy=False), dimensions=None, normalize=True)


def neighbours(vectors: Floats, k: int = K) -> Indices:
    """Return the ``k`` other rows nearest to each unit row, nearest first, shape (n, k).

    Where there are fewer than ``k`` others it is all of them.
    """
    k = min(k, len(vectors) - 1)
    found = np.empty((len(vectors), k), dtype=np.int64)
    for start, scores in _scores(vectors, vectors, leave_self_out=True):
        nearest = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        order = np.argsort(-np.take_along_axis(scores, nearest, axis=1), axis=1, kind="stable")
        found[start : start + len(scores)] = np.take_along_axis(nearest, order, axis=1)
    return found


def neighbour_overlap(teacher: Floats, student: Floats, k: int = K) -> Values:
    """Return the share of each text's ``k`` nearest neighbours that both models have."""
    ours, theirs = neighbours(student, k), neighbours(teacher, k)
    shared: Values = np.mean((theirs[:, :, None] == ours[:, None, :]).any(axis=2), axis=1)
    return shared


def ndcg(
    queries: Floats,
    documents: Floats,
    relevant: Indices,
    gains: Values | None = None,
    k: int = K,
    *,
    leave_self_out: bool = False,
) -> Values:
    """Return NDCG@k of each query, gains linear (Jarvelin and Kekalainen, 2002).

    Documents that score alike share the mean discount of their places (McSherry and Najork, 2008): a
    model that gives every text one vector does not find anything.

    Args:
        queries: shape (queries, d).
        documents: shape (documents, d).
        relevant: as :class:`LabelledRetrieval` has it.
        gains: the same; every query needs one above 0.
        k: places that count.
        leave_self_out: queries are the documents, and none is an answer to itself.
    """
    relevant = relevant.reshape(len(queries), -1)
    gains = np.ones(relevant.shape) if gains is None else gains.reshape(relevant.shape)
    discounts = np.zeros(max(len(documents), relevant.shape[1], k))
    discounts[:k] = 1 / np.log2(2 + np.arange(k))
    until = np.concatenate([[0.0], np.cumsum(discounts)])
    found = np.zeros(len(queries))
    for start, scores in _scores(unit(queries), unit(documents), leave_self_out=leave_self_out):
        rows = slice(start, start + len(scores))
        for answer, gain in zip(relevant[rows].T, gains[rows].T, strict=True):
            own = np.take_along_axis(scores, answer[:, None], axis=1)
            before = np.count_nonzero(scores > own + np.float32(TIE), axis=1)
            upto = np.count_nonzero(scores >= own - np.float32(TIE), axis=1)
            found[rows] += gain * (until[upto] - until[before]) / (upto - before)
    best: Values = found / (-np.sort(-gains, axis=1) @ discounts[: gains.shape[1]])
    return best


def ranking_ndcg(teacher: Floats, student: Floats, k: int = K) -> Values:
    """Return for each text NDCG@k of the student's ranking of the others against the teacher's own.

    The teacher's nearest neighbour is worth ``k``, the next ``k - 1``, its k-th 1, all others nothing.
    It says how alike two models rank, not how well either does.
    """
    nearest = neighbours(teacher, k)
    worth = np.broadcast_to(np.arange(nearest.shape[1], 0, -1.0), nearest.shape)
    return ndcg(student, student, nearest, worth, k, leave_self_out=True)


def padded(relevant: Sequence[Sequence[int]]) -> tuple[Indices, Values]:
    """Return the answers of each query, at least one, as :func:`ndcg` takes them: indices and gains."""
    most = max(map(len, relevant))
    indices = np.array([[*one, *[one[0]] * (most - len(one))] for one in relevant], dtype=np.int64)
    return indices, np.array([[1.0] * len(one) + [0.0] * (most - len(one)) for one in relevant])


def _scores(
    queries: Floats, documents: Floats, *, leave_self_out: bool
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    for start in range(0, len(queries), BLOCK_ROWS):
        scores = queries[start : start + BLOCK_ROWS] @ documents.T
        if leave_self_out:
            rows = np.arange(len(scores))
            scores[rows, start + rows] = -np.inf
        yield start, scores
