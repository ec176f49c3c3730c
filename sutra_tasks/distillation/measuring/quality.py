"""How good a student is: what it keeps of its teacher's vectors, with intervals.

Everything is measured on texts that the student has not learned from. Vectors are rows, in the order of
the texts; intervals come from a bootstrap over texts or queries, never over pairs, which are not
independent. Nothing here takes more than some 100 MB beside the vectors at 5,000 texts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from sutra_tasks.distillation.measuring.ranking import (
    Indices,
    Values,
    ndcg,
    neighbour_overlap,
    ranking_ndcg,
    unit,
)
from sutra_tasks.distillation.training.projection import ceiling, lift, project

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sutra_tasks.vectors import Floats

__all__ = [
    "Interval",
    "LabelledRetrieval",
    "Quality",
    "bootstrap",
    "cosines",
    "draw_pairs",
    "measure_quality",
    "ndcg_ratio",
    "ranks",
    "spearman",
    "spearman_interval",
    "squared_errors",
]

PAIRS: Final = 50_000
REPEATS: Final = 1_000
BLOCK_DRAWS: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure and the bounds between which it lies with the bootstrap's confidence, 95% if not said."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, eq=False)
class LabelledRetrieval:
    """Queries, documents, and which of these answer which query; all vectors are rows.

    Attributes:
        teacher_queries: the teacher's vectors, shape (queries, d).
        teacher_documents: shape (documents, d).
        student_queries: the student's, shape (queries, width).
        student_documents: shape (documents, width).
        relevant: documents that answer each query, shape (queries,) or (queries, most answers).
        gains: what each is worth, in the shape of ``relevant``, 0 where there is none; None: 1 each.
    """

    teacher_queries: Floats
    teacher_documents: Floats
    student_queries: Floats
    student_documents: Floats
    relevant: Indices
    gains: Values | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """What a student keeps of its teacher on held-out text.

    Attributes:
        texts: on how many it was measured.
        cosine: mean between the student's vector and ``normalize(P t)``, the teacher's projected.
        cosine_p5: the 5th percentile of the same.
        ceiling: the highest ``lifted_cosine`` that any student of this projection can have.
        lifted_cosine: mean between the teacher's vector and ``P' s``, the student's brought back.
        mse: mean over texts of the squared distance between unit vectors, summed over dimensions.
        spearman: rank correlation of pairwise similarities, the teacher's with the student's.
        top10: share of a text's ten nearest neighbours that both have; neighbours are held-out texts.
        ranking_ndcg: NDCG@10 of the student's ranking of the other texts against the teacher's own.
        ndcg_ratio: NDCG@10 on labelled retrieval, the student's over the teacher's; None without labels,
            or if the teacher finds nothing.
        ndcg_teacher: the teacher's NDCG@10 on the labels.
        ndcg_student: the student's.
    """

    texts: int
    cosine: Interval
    cosine_p5: Interval
    ceiling: float
    lifted_cosine: Interval
    mse: Interval
    spearman: Interval
    top10: Interval
    ranking_ndcg: Interval
    ndcg_ratio: Interval | None = None
    ndcg_teacher: Interval | None = None
    ndcg_student: Interval | None = None

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON: numbers, and objects of ``value``, ``low`` and ``high``."""
        return asdict(self)


def measure_quality(
    teacher: Floats,
    student: Floats,
    matrix: Floats,
    *,
    rng: np.random.Generator,
    labelled: LabelledRetrieval | None = None,
    repeats: int = REPEATS,
) -> Quality:
    """Measure a student against its teacher on the same held-out texts.

    Args:
        teacher: its vectors, shape (n, d), n at least 3.
        student: its vectors, shape (n, width), before or after normalisation.
        matrix: the projection between them, shape (width, d); the identity where there is none.
        rng: draws pairs and resamples.
        labelled: retrieval with known answers, if there is any.
        repeats: resamples of every bootstrap.
    """
    teacher, student = unit(teacher), unit(student)
    target = project(matrix, teacher)
    near = cosines(target, student)

    def mean(values: Values) -> Interval:
        return bootstrap(values, rng=rng, repeats=repeats)

    ratio = ndcg_teacher = ndcg_student = None
    if labelled is not None:
        of, labels = labelled, (labelled.relevant, labelled.gains)
        theirs = ndcg(of.teacher_queries, of.teacher_documents, *labels)
        ours = ndcg(of.student_queries, of.student_documents, *labels)
        ndcg_teacher, ndcg_student = mean(theirs), mean(ours)
        ratio = ndcg_ratio(theirs, ours, rng=rng, repeats=repeats)
    return Quality(
        texts=len(teacher),
        cosine=mean(near),
        cosine_p5=bootstrap(near, _fifth_percentile, rng=rng, repeats=repeats),
        ceiling=ceiling(matrix, teacher),
        lifted_cosine=mean(cosines(teacher, lift(matrix, student))),
        mse=mean(squared_errors(target, student)),
        spearman=spearman_interval(
            teacher, student, draw_pairs(len(teacher), PAIRS, rng), rng=rng, repeats=repeats
        ),
        top10=mean(neighbour_overlap(teacher, student)),
        ranking_ndcg=mean(ranking_ndcg(teacher, student)),
        ndcg_ratio=ratio,
        ndcg_teacher=ndcg_teacher,
        ndcg_student=ndcg_student,
    )


def cosines(a: Floats, b: Floats) -> Values:
    """Return the cosine of each row of ``a`` with the same row of ``b``, 0 for a row of zeros."""
    return _products(unit(a), unit(b))


def squared_errors(a: Floats, b: Floats) -> Values:
    """Return the squared distance of each two rows, normalised, summed over dimensions: 0 to 4."""
    apart = unit(a) - unit(b)
    return _products(apart, apart)


def bootstrap(
    values: Values,
    statistic: Callable[[Values], Values] | None = None,
    *,
    rng: np.random.Generator,
    repeats: int = REPEATS,
    share: float = 0.95,
) -> Interval:
    """Return a statistic with its percentile bootstrap interval (Efron and Tibshirani, 1993, ch. 13).

    Args:
        values: one for each text or query, shape (n, ...), n at least 1.
        statistic: of samples, shape (samples, n, ...), one number each; None: the mean.
        rng: draws the resamples.
        repeats: how many.
        share: how often such an interval is to hold the true value.
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
    return _interval(float(of(values[None])[0]), np.concatenate(found), share)


def ranks(order: NDArray[np.intp], weights: Values) -> Values:
    """Return the rank of each value, from 1, ties sharing their mean rank, float64, shape (n,).

    Args:
        order: place of each value among the distinct ones, from 0; as ``unique`` gives the inverse.
        weights: how often each value is there.
    """
    size = np.bincount(order, weights)
    ranked: Values = (np.cumsum(size) - size + (size + 1) / 2)[order]
    return ranked


def draw_pairs(n: int, most: int, rng: np.random.Generator) -> Indices:
    """Return pairs of different indices under ``n``, shape (pairs, 2): all, or ``most`` drawn."""
    if n * (n - 1) // 2 <= most:
        return np.stack(np.triu_indices(n, 1), axis=1).astype(np.int64)
    first = rng.integers(n, size=most)
    return np.stack([first, (first + rng.integers(1, n, size=most)) % n], axis=1)


def spearman(a: Floats, b: Floats, pairs: Indices) -> float:
    """Return the rank correlation of the pairs' cosines in ``a`` and ``b``; 0 if one's are equal."""
    one, other = (_groups(rows, pairs) for rows in (a, b))
    return _correlation(one, other, np.ones(len(pairs)))


def spearman_interval(
    a: Floats, b: Floats, pairs: Indices, *, rng: np.random.Generator, repeats: int = REPEATS
) -> Interval:
    """Return :func:`spearman` with an interval from resampled texts, and all pairs of a text with it.

    A pair counts as often as the product of its texts' draws; so few pairs make it wider, not narrower.
    """
    n = len(a)
    one, other = (_groups(rows, pairs) for rows in (a, b))
    found = np.empty(repeats)
    for repeat in range(repeats):
        counts = np.bincount(rng.integers(n, size=n), minlength=n).astype(np.float64)
        found[repeat] = _correlation(one, other, counts[pairs[:, 0]] * counts[pairs[:, 1]])
    return _interval(_correlation(one, other, np.ones(len(pairs))), found, 0.95)


def ndcg_ratio(
    teacher: Values, student: Values, *, rng: np.random.Generator, repeats: int = REPEATS
) -> Interval | None:
    """Return the student's mean NDCG over the teacher's, with an interval from resampled queries.

    Both are one a query; a resample holds the same queries of both. None if the teacher's mean is 0.
    """
    if not teacher.mean():
        return None
    return bootstrap(np.stack([student, teacher], axis=1), _ratio, rng=rng, repeats=repeats)


def _fifth_percentile(samples: Values) -> Values:
    return np.asarray(np.percentile(samples, 5, axis=1))


def _ratio(samples: Values) -> Values:
    ours, theirs = samples.mean(axis=1).T
    # A resample in which the teacher finds nothing compares nothing.
    ratios: Values = np.divide(ours, theirs, out=np.full(len(ours), np.nan), where=theirs > 0)
    return ratios


def _interval(value: float, found: Values, share: float) -> Interval:
    low, high = np.nanpercentile(found, [50 * (1 - share), 50 * (1 + share)])
    return Interval(value, float(low), float(high))


def _products(a: Floats, b: Floats) -> Values:
    products: Values = np.einsum("ij,ij->i", a, b, dtype=np.float64)
    return products


def _groups(rows: Floats, pairs: Indices) -> NDArray[np.intp]:
    rows = unit(rows)
    blocks = np.array_split(pairs, max(1, len(pairs) // 8_192))
    found = [_products(rows[some[:, 0]], rows[some[:, 1]]) for some in blocks]
    # Similarities closer than that are rounding apart: they share a rank.
    rounded = np.round(np.concatenate(found), 6)
    groups: NDArray[np.intp] = np.unique(rounded, return_inverse=True)[1]
    return groups


def _correlation(one: NDArray[np.intp], other: NDArray[np.intp], weights: Values) -> float:
    total = weights.sum()
    if not total:
        return np.nan
    x, y = ranks(one, weights), ranks(other, weights)
    # Not as products of matrices: for threads of a BLAS these are too short, and waking them is slow.
    x -= (weights * x).sum() / total
    y -= (weights * y).sum() / total
    spread = np.sqrt((weights * x * x).sum() * (weights * y * y).sum())
    return float((weights * x * y).sum() / spread) if spread else 0.0
