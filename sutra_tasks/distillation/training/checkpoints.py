"""Checkpoints of a training run, from which it continues after its process was killed.

A checkpoint is a folder of two files, ``tensors.safetensors`` and ``state.json``. The state has the
sha256 of the tensors, and of itself. The folder is written atomically, so one that exists is complete.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from sutra_tasks.files import replacing, sweep, write_whole

if TYPE_CHECKING:
    from sutra_tasks.distillation.config import DistillationConfig

__all__ = ["Checkpoint", "clear", "due", "latest", "read_tensors", "write", "write_tensors"]

VERSION: Final = 1
KEPT: Final = 2
"""Checkpoints that stay; older ones are deleted."""
TENSORS: Final = "tensors.safetensors"
STATE: Final = "state.json"
_NAME: Final = re.compile(r"checkpoint-(\d{9})")

Array = NDArray[Any]


@dataclass(frozen=True, slots=True, repr=False)
class Checkpoint:
    """The state of a training run after ``step`` steps.

    Attributes:
        step: steps done.
        epoch: epochs done.
        tensors: weights, the optimizer's moments and random states, by name.
        scalars: everything else, as JSON; floats are restored exactly.
    """

    step: int
    epoch: int
    tensors: Mapping[str, Array]
    scalars: Mapping[str, Any] = field(default_factory=dict)


def due(step: int, last_step: int, now: float, last_at: float, config: DistillationConfig) -> bool:
    """Return whether a checkpoint has to be written after ``step``.

    Args:
        step: steps done.
        last_step: steps done at the last checkpoint; 0 before the first.
        now: seconds of the clock of ``last_at``, which stops while the run is paused.
        last_at: when the last checkpoint was written.
        config: with the steps and minutes between two checkpoints.
    """
    late = now - last_at >= config.checkpoint_minutes * 60
    return step > last_step and (late or step - last_step >= config.checkpoint_steps)


def write(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint, delete all but the last two, and return its path.

    If the process dies at any moment, :func:`latest` finds this checkpoint or the one before.
    """
    path = folder / f"checkpoint-{checkpoint.step:09d}"
    with replacing(path) as temporary:
        temporary.mkdir(parents=True)
        state = {
            "v": VERSION,
            "step": checkpoint.step,
            "epoch": checkpoint.epoch,
            "sha256": write_tensors(temporary / TENSORS, checkpoint.tensors),
            "scalars": dict(checkpoint.scalars),
        }
        # A digest of the state as well: a damaged state could still be valid JSON.
        text = json.dumps(state, sort_keys=True)
        sealed = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "state": text}
        write_whole(temporary / STATE, json.dumps(sealed).encode())
    for old in _found(folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    sweep(folder)
    return path


def latest(folder: Path) -> Checkpoint | None:
    """Return the last undamaged checkpoint in ``folder``; None if there is none."""
    for path in reversed(_found(folder)):
        try:
            return _read(path)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            continue
    return None


def clear(folder: Path) -> None:
    """Delete all checkpoints in ``folder``."""
    for path in _found(folder):
        shutil.rmtree(path)


def write_tensors(path: Path, tensors: Mapping[str, Array]) -> str:
    """Write arrays to one file atomically; return the sha256 of the file."""
    with replacing(path) as temporary:
        save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, temporary)
        with temporary.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def read_tensors(path: Path) -> dict[str, Array]:
    """Return the arrays in a file of :func:`write_tensors`."""
    return dict(load_file(path))


def _read(path: Path) -> Checkpoint:
    sealed = json.loads((path / STATE).read_text("utf-8"))
    text = str(sealed["state"])
    if hashlib.sha256(text.encode()).hexdigest() != sealed["sha256"]:
        raise ValueError("the state is not what was written")
    state = json.loads(text)
    with (path / TENSORS).open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if state["v"] != VERSION or found != state["sha256"]:
        raise ValueError("the tensors are not what was written")
    return Checkpoint(state["step"], state["epoch"], read_tensors(path / TENSORS), state["scalars"])


def _found(folder: Path) -> list[Path]:
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in paths if _NAME.fullmatch(path.name))
