"""The optimizer of a training run, AdamW, and its learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from sutra_tasks.distillation.config import DistillationConfig

__all__ = ["build_optimizer", "learning_rate_share"]


def build_optimizer(
    weights: Mapping[str, torch.Tensor], config: DistillationConfig
) -> torch.optim.Optimizer:
    """Return AdamW for the weights that a recipe trains."""
    groups = _groups(weights, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)


def learning_rate_share(step: int, steps: int, warmup_share: float) -> float:
    """Return the learning rate as a share of its peak: linear warm-up, then linear decay to 0.

    Args:
        step: counted from 0.
        steps: of the whole training.
        warmup_share: share of the steps that warm up.
    """
    warmup = max(1, round(steps * warmup_share)) if warmup_share else 0
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return max(0.0, (steps - step) / max(1, steps - warmup))


def _groups(weights: Mapping[str, torch.Tensor], decay: float) -> list[dict[str, Any]]:
    """Return the optimizer's groups: biases and LayerNorm's weights, the vectors, have no decay."""
    matrices = [weight for weight in weights.values() if weight.ndim > 1]
    vectors = [weight for weight in weights.values() if weight.ndim <= 1]
    return [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
