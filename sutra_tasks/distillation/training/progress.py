"""The state, progress and result of a training run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["TrainingProgress", "TrainingResult", "TrainingState"]


@dataclass(frozen=True, slots=True)
class TrainingProgress:
    """Progress after a step, for the run's caller.

    Attributes:
        epoch: of the step, counted from 1.
        epochs: at most.
        step: steps done.
        steps: at most.
        loss: of the step's batch; the next four are its terms.
        mse: squared error summed over dimensions, mean over texts.
        cosine: 1 - mean cosine.
        similarity: mean squared difference of similarities within the batch.
        task: the contrastive loss.
        quality: mean cosine on held-out texts at the last evaluation; None before the first.
        best_quality: the highest of all evaluations.
        texts_per_s: texts learned from a second, without pauses.
        left_s: seconds until the last step, unless the training ends earlier.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    mse: float
    cosine: float
    similarity: float
    task: float
    quality: float | None
    best_quality: float | None
    texts_per_s: float
    left_s: float


@dataclass(frozen=True, slots=True, repr=False)
class TrainingResult:
    """The result of a training run.

    Attributes:
        quality: mean cosine on held-out texts with the student's final weights.
        epochs: epochs that began.
        steps: steps done.
        curves: for each evaluation ``step``, ``quality``, and the means of the loss and its terms since
            the evaluation before.
        seconds: of training and evaluating in all processes of the run, without pauses.
    """

    quality: float
    epochs: int
    steps: int
    curves: list[dict[str, Any]]
    seconds: float


@dataclass(slots=True)
class TrainingState:
    """Everything that a checkpoint stores besides tensors; JSON.

    Attributes:
        step: steps done.
        quality: at the last evaluation.
        best_quality: the highest of all evaluations.
        without_better: evaluations since the best one.
        finished: whether the training has ended.
        worked_s: seconds of work in all processes of the run, without pauses.
        sums: sums of the loss and its terms since the last evaluation, by name.
        since: steps in those sums.
        curves: see :class:`TrainingResult`.
        first_loss: the loss of the first step.
    """

    step: int = 0
    quality: float | None = None
    best_quality: float | None = None
    without_better: int = 0
    finished: bool = False
    worked_s: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    since: int = 0
    curves: list[dict[str, Any]] = field(default_factory=list)
    first_loss: float | None = None
