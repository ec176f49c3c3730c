"""How good a student is: how much of its teacher's vectors it preserves, with confidence intervals.

Everything is measured on texts that the student has not learned from. Vectors are rows, in the order of
the texts. At 5,000 texts it takes some 100 MB beside the vectors.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from sutra_tasks.distillation.measuring.bootstrap import (
    REPEATS,
    Interval,
    bootstrap,
    ratio_of_means,
)
from sutra_tasks.distillation.measuring.correlation import draw_pairs, spearman_interval
from sutra_tasks.distillation.measuring.ranking import (
    Indices,
    Values,
    cosines,
    ndcg,
    neighbour_overlap,
    ranking_ndcg,
    squared_errors,
    unit,
)
from sutra_tasks.distillation.training.projection import ceiling, lift, project

if TYPE_CHECKING:
    from sutra_tasks.vectors import Floats

__all__ = ["LabelledRetrieval", "Quality", "measure_quality"]

PAIRS: Final = 50_000
"""Pairs of texts whose similarities are compared, at most."""


@dataclass(frozen=True, slots=True, eq=False)
class LabelledRetrieval:
    """Queries, documents, and the documents that answer each query; all vectors are rows.

    Attributes:
        teacher_queries: the teacher's vectors, shape (queries, d).
        teacher_documents: shape (documents, d).
        student_queries: the student's, shape (queries, width).
        student_documents: shape (documents, width).
        relevant: indices of the answers of each query, shape (queries,) or (queries, answers).
        gains: worth of each answer, in the shape of ``relevant``; 0 pads queries with fewer answers.
            None: 1 each.
    """

    teacher_queries: Floats
    teacher_documents: Floats
    student_queries: Floats
    student_documents: Floats
    relevant: Indices
    gains: Values | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """How much of its teacher a student preserves on held-out text.

    Attributes:
        texts: number of texts that it was measured on.
        lifted_cosine: what is kept of the teacher: mean cosine between its vector and ``P' s``, the
            student's vector mapped back to the teacher's width.
        ceiling: the highest ``lifted_cosine`` that any student of this projection can have.
        cosine: mean cosine between the student's vector and ``normalize(P t)``, the projected
            teacher's: 1 by construction for a student that is a projection alone.
        cosine_p5: the 5th percentile of the same cosine.
        mse: mean over texts of the squared distance between unit vectors, summed over dimensions.
        spearman: rank correlation of pairwise similarities, the teacher's with the student's.
        top10: share of a text's ten nearest held-out texts on which both models agree.
        ranking_ndcg: NDCG@10 of the student's ranking of the other texts against the teacher's ranking.
        ndcg_ratio: NDCG@10 on labelled retrieval, the student's divided by the teacher's; None without
            labels, or if the teacher finds nothing.
        ndcg_teacher: the teacher's NDCG@10 on the labels.
        ndcg_student: the student's.
    """

    texts: int
    lifted_cosine: Interval
    ceiling: float
    cosine: Interval
    cosine_p5: Interval
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
        teacher: the teacher's vectors, shape (n, d), n at least 3.
        student: the student's vectors, shape (n, width), normalised or not.
        matrix: the projection, shape (width, d); the identity if there is none.
        rng: draws pairs and resamples.
        labelled: retrieval with known answers, if there is any.
        repeats: resamples of each figure.
    """
    teacher, student = unit(teacher), unit(student)
    target = project(matrix, teacher)
    near = cosines(target, student)

    def mean(values: Values) -> Interval:
        return bootstrap(values, rng=rng, repeats=repeats)

    ratio = ndcg_teacher = ndcg_student = None
    if labelled is not None:
        labels = labelled.relevant, labelled.gains
        of_teacher = ndcg(labelled.teacher_queries, labelled.teacher_documents, *labels)
        of_student = ndcg(labelled.student_queries, labelled.student_documents, *labels)
        ndcg_teacher, ndcg_student = mean(of_teacher), mean(of_student)
        ratio = ratio_of_means(of_teacher, of_student, rng=rng, repeats=repeats)
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


def _fifth_percentile(samples: Values) -> Values:
    return np.asarray(np.percentile(samples, 5, axis=1))
