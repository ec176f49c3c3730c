"""The training loss: the distance between the student's vectors and the projected teacher's.

On unit vectors the squared error and the cosine loss have the same gradient up to a factor, so mixing
them would change nothing. Therefore the squared error is computed on the student's output before it
normalises, where it also pulls the output to unit length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from sutra_tasks.distillation.config import DistillationConfig

__all__ = ["DistillationLoss", "LossTerms", "contrastive"]

TEMPERATURE: Final = 0.05
"""Of the contrastive loss; the same as sentence-transformers' default scale of 20."""


@dataclass(frozen=True, slots=True)
class LossTerms:
    """The loss of one batch and its terms, each a tensor of one number.

    Attributes:
        total: the loss that is minimised.
        mse: squared error summed over dimensions, mean over texts.
        cosine: 1 - mean cosine to the target.
        similarity: mean squared difference of the similarities within the batch.
        task: the contrastive loss on labelled pairs; 0 without pairs.
    """

    total: torch.Tensor
    mse: torch.Tensor
    cosine: torch.Tensor
    similarity: torch.Tensor
    task: torch.Tensor

    def numbers(self) -> dict[str, float]:
        """Return the terms as numbers, by name; the total is named ``loss``."""
        names = ("mse", "cosine", "similarity", "task")
        return {"loss": self.total.item()} | {name: getattr(self, name).item() for name in names}


@dataclass(frozen=True, slots=True)
class DistillationLoss:
    """``(1 - task_weight) * distillation + task_weight * contrastive``.

    The distillation is ``alpha * mse + (1 - alpha) * cosine + similarity_weight * similarity``. With
    Matryoshka widths it is the mean over these widths and the whole width, where the target's first
    dimensions are normalised again (Kusupati et al. 2022).

    Attributes:
        alpha: share of the squared error; the rest is the cosine loss.
        task_weight: share of the contrastive loss.
        similarity_weight: weight of the term on similarities within a batch.
        widths: narrower widths at which the vectors should be good as well.
    """

    alpha: float = 0.5
    task_weight: float = 0.0
    similarity_weight: float = 0.0
    widths: tuple[int, ...] = ()

    @classmethod
    def of(cls, config: DistillationConfig) -> DistillationLoss:
        """Return the loss that a recipe asks for."""
        return cls(config.alpha, config.task_weight, config.similarity_weight, config.matryoshka)

    def __call__(
        self,
        outputs: torch.Tensor,
        targets: torch.Tensor,
        pairs: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> LossTerms:
        """Return the loss of one batch.

        Args:
            outputs: the student's output before it normalises: float, shape (texts, width).
            targets: unit rows of the same shape.
            pairs: the student's outputs for the queries and for the answers of labelled pairs, both of
                shape (pairs, width); None: the task loss is 0.
        """
        mse, cosine, similarity = self._distillation(outputs, targets, [*self.widths, outputs.shape[1]])
        task = contrastive(*pairs) if pairs is not None else outputs.new_zeros(())
        distilled = self.alpha * mse + (1 - self.alpha) * cosine + self.similarity_weight * similarity
        share = self.task_weight if pairs is not None else 0.0
        return LossTerms((1 - share) * distilled + share * task, mse, cosine, similarity, task)

    def _distillation(
        self, outputs: torch.Tensor, targets: torch.Tensor, widths: Sequence[int]
    ) -> tuple[torch.Tensor, ...]:
        terms = []
        for width in widths:
            output, target = outputs[:, :width], functional.normalize(targets[:, :width], dim=1)
            unit = functional.normalize(output, dim=1)
            mse = (output - target).square().sum(dim=1).mean()
            cosine = 1 - (unit * target).sum(dim=1).mean()
            similarity = outputs.new_zeros(())
            if self.similarity_weight:
                similarity = (unit @ unit.T - target @ target.T).square().mean()
            terms.append(torch.stack([mse, cosine, similarity]))
        return torch.stack(terms).mean(dim=0).unbind()


def contrastive(queries: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    """Return InfoNCE within a batch: each query's answer against the answers of the other queries.

    van den Oord et al. 2018, on cosines divided by :data:`TEMPERATURE`.

    Args:
        queries: float, shape (pairs, width), not normalised.
        positives: row ``i`` answers row ``i`` of the queries.
    """
    cosines = functional.normalize(queries, dim=1) @ functional.normalize(positives, dim=1).T
    answers = torch.arange(len(queries), device=cosines.device)
    return functional.cross_entropy(cosines / TEMPERATURE, answers)
