"""Similarities of vectors, nearest neighbours, and NDCG, which rates a ranking of documents.

Similarities are computed in blocks of rows, so that 5,000 texts compared with 5,000 need some 50 MB.
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
    "cosines",
    "ndcg",
    "neighbour_overlap",
    "neighbours",
    "padded",
    "ranking_ndcg",
    "row_products",
    "squared_errors",
    "unit",
]

Values = NDArray[np.float64]
Indices = NDArray[np.int64]

K: Final = 10
BLOCK_ROWS: Final = 512
TIE: Final = 1e-6
"""Similarities that are closer differ by rounding only, and count as equal."""


def unit(rows: Floats) -> Floats:
    """Return rows as float32 of unit length; a row of zeros stays zero."""
    return finish(rows.astype(np.float32, copy=False), dimensions=None, normalize=True)


def cosines(a: Floats, b: Floats) -> Values:
    """Return the cosine of each row of ``a`` with the same row of ``b``, 0 for a row of zeros."""
    return row_products(unit(a), unit(b))


def squared_errors(a: Floats, b: Floats) -> Values:
    """Return the squared distance of each two rows, normalised, summed over dimensions: 0 to 4."""
    apart = unit(a) - unit(b)
    return row_products(apart, apart)


def neighbours(vectors: Floats, k: int = K) -> Indices:
    """Return the indices of the ``k`` rows nearest to each unit row, nearest first, shape (n, k).

    A row is not its own neighbour. With fewer than ``k`` other rows, all of them are returned.
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

    Documents of equal score share the mean discount of their ranks (McSherry and Najork, 2008), so a
    model that gives every text the same vector gains nothing by the order of documents.

    Args:
        queries: shape (queries, d).
        documents: shape (documents, d).
        relevant: indices of the answers of each query, shape (queries,) or (queries, answers).
        gains: worth of each answer, in the shape of ``relevant``; each query needs one above 0. None: 1.
        k: ranks that count.
        leave_self_out: queries and documents are the same texts; a text is not ranked for itself.
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
            score = np.take_along_axis(scores, answer[:, None], axis=1)
            before = np.count_nonzero(scores > score + np.float32(TIE), axis=1)
            upto = np.count_nonzero(scores >= score - np.float32(TIE), axis=1)
            found[rows] += gain * (until[upto] - until[before]) / (upto - before)
    best: Values = found / (-np.sort(-gains, axis=1) @ discounts[: gains.shape[1]])
    return best


def ranking_ndcg(teacher: Floats, student: Floats, k: int = K) -> Values:
    """Return for each text NDCG@k of the student's ranking of the other texts against the teacher's.

    The teacher's nearest neighbour has gain ``k``, the next ``k - 1``, the k-th 1, all others 0. This
    measures how similarly the models rank, not how well either does.
    """
    nearest = neighbours(teacher, k)
    worth = np.broadcast_to(np.arange(nearest.shape[1], 0, -1.0), nearest.shape)
    return ndcg(student, student, nearest, worth, k, leave_self_out=True)


def padded(relevant: Sequence[Sequence[int]]) -> tuple[Indices, Values]:
    """Return indices and gains for :func:`ndcg`, given the answers of each query, at least one."""
    most = max(map(len, relevant))
    indices = np.array([[*one, *[one[0]] * (most - len(one))] for one in relevant], dtype=np.int64)
    return indices, np.array([[1.0] * len(one) + [0.0] * (most - len(one)) for one in relevant])


def _scores(
    queries: Floats, documents: Floats, *, leave_self_out: bool
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield the first query of each block and the block's scores, shape (queries, documents)."""
    for start in range(0, len(queries), BLOCK_ROWS):
        scores = queries[start : start + BLOCK_ROWS] @ documents.T
        if leave_self_out:
            rows = np.arange(len(scores))
            scores[rows, start + rows] = -np.inf
        yield start, scores


def row_products(a: Floats, b: Floats) -> Values:
    """Return the dot product of each row of ``a`` with the same row of ``b``, in float64."""
    products: Values = np.einsum("ij,ij->i", a, b, dtype=np.float64)
    return products
