"""What a run is called: its model in the registry, and its place on disk."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from sutra_tasks.distillation.config import DistillationConfig
    from sutra_tasks.settings import Settings

__all__ = ["default_name", "model_name", "runs_folder"]

RUNS: Final = ".runs"
MOST_OF_TEACHER: Final = 40


def default_name(config: DistillationConfig) -> str:
    """Return the name of a model that was given none: made of teacher, student and width."""
    teacher = re.sub(r"[^A-Za-z0-9.]+", "-", config.teacher.partition("@")[0])
    # What a cut leaves at either end is stripped after it: a name begins with a letter or a digit.
    teacher = re.sub(r"\.{2,}", ".", teacher)[-MOST_OF_TEACHER:].strip("-.")
    kind = config.student + (str(config.layers) if config.layers else "")
    return "-".join([teacher or "model", kind, *([str(config.output_dim)] if config.output_dim else [])])


def model_name(config: DistillationConfig) -> str:
    """Return the name of the model that a recipe makes a version of."""
    return config.name or default_name(config)


def runs_folder(options: Settings) -> Path:
    """Return the folder of all runs."""
    return Path(options.models_dir or ".").expanduser() / RUNS
