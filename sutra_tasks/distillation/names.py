"""Names and fingerprints of runs: the student's model in the registry, and the run's folder."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sutra_tasks.models.registry.names import shown_name

if TYPE_CHECKING:
    from sutra_tasks.distillation.config import DistillationConfig
    from sutra_tasks.settings import Settings

__all__ = ["default_name", "fingerprint", "model_name", "runs_folder"]

RUNS: Final = ".runs"
TEACHER_CHARS: Final = 40
"""Characters of the teacher's name that a default name keeps."""


def default_name(config: DistillationConfig) -> str:
    """Return a model's name made of its teacher, its kind of student and its width."""
    teacher = re.sub(r"[^A-Za-z0-9.]+", "-", shown_name(config.teacher).partition("@")[0])
    # Stripped after the cut, which may leave a hyphen or a dot at either end.
    teacher = re.sub(r"\.{2,}", ".", teacher)[-TEACHER_CHARS:].strip("-.")
    kind = config.student + (str(config.layers) if config.layers else "")
    return "-".join([teacher or "model", kind, *([str(config.output_dim)] if config.output_dim else [])])


def model_name(config: DistillationConfig) -> str:
    """Return the name of the model that gets the student as a new version."""
    return config.name or default_name(config)


def runs_folder(options: Settings) -> Path:
    """Return the folder of all runs, inside the registry."""
    return Path(options.models_dir or ".").expanduser() / RUNS


def fingerprint(value: Any) -> str:
    """Return the sha256 of a JSON value, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
