"""Where a training run is, and what it came to: values that need no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["TrainingProgress", "TrainingResult", "TrainingState", "learning_rate_share"]


@dataclass(frozen=True, slots=True)
class TrainingProgress:
    """Where a run is after a step.

    Attributes:
        epoch: of the step, counted from 1.
        epochs: at most.
        step: steps done.
        steps: at most.
        loss: of the step's batch; its parts beside it.
        mse: squared error summed over dimensions, mean over texts.
        cosine: 1 - mean cosine.
        similarity: squared difference of similarities within the batch.
        task: the contrastive loss.
        quality: mean cosine on held-out texts when last measured; None before.
        best_quality: the best so far.
        texts_per_s: learned from, pauses left out.
        left_s: until the last step, if nothing ends the run before.
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
    """What a run came to.

    Attributes:
        quality: mean cosine on held-out texts of the weights that the student now has.
        epochs: begun.
        steps: done.
        curves: an object for each evaluation: step, quality, and the mean loss and its parts since the
            evaluation before.
        seconds: of training and measuring in all processes of the run, pauses left out.
    """

    quality: float
    epochs: int
    steps: int
    curves: list[dict[str, Any]]
    seconds: float


@dataclass(slots=True)
class TrainingState:
    """All of a run that is no tensor; travels as JSON.

    Attributes:
        step: steps done.
        quality: when last measured.
        best_quality: the best so far.
        without_better: evaluations since.
        finished: nothing is left to do.
        worked_s: in all processes of the run, pauses left out.
        sums: of the losses since the last evaluation, by name.
        since: steps they are sums of.
        curves: see :class:`TrainingResult`.
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


def learning_rate_share(step: int, steps: int, warmup_share: float) -> float:
    """Return the share of the peak learning rate in a step, counted from 0: up, then down to 0."""
    warmup = max(1, round(steps * warmup_share)) if warmup_share else 0
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return max(0.0, (steps - step) / max(1, steps - warmup))
