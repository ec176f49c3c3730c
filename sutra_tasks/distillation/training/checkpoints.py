"""What a training run needs to go on after its process was killed: written whole, or not at all.

A checkpoint is a folder of two files, ``tensors.safetensors`` and ``state.json``; the second holds the
sha256 of the first and is covered by the folder's name. It is written under another name, brought to
the disk and renamed, so a name that is there belongs to a whole one.
"""

from __future__ import annotations

import hashlib
import json
import os
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

if TYPE_CHECKING:
    from sutra_tasks.distillation.config import DistillationConfig

__all__ = ["Checkpoint", "clear", "due", "latest", "read_tensors", "write", "write_tensors"]

VERSION: Final = 1
KEPT: Final = 2
TENSORS: Final = "tensors.safetensors"
STATE: Final = "state.json"
_NAME: Final = re.compile(r"checkpoint-(\d{9})")

Array = NDArray[Any]


@dataclass(frozen=True, slots=True, repr=False)
class Checkpoint:
    """The state of a run after ``step`` steps.

    Attributes:
        step: steps done.
        epoch: epochs done.
        tensors: weights, moments and random states, by name.
        scalars: all else, as JSON; floats come back exactly.
    """

    step: int
    epoch: int
    tensors: Mapping[str, Array]
    scalars: Mapping[str, Any] = field(default_factory=dict)


def due(step: int, last_step: int, now: float, last_at: float, config: DistillationConfig) -> bool:
    """Tell whether a checkpoint is to be written after ``step``.

    Args:
        step: steps done.
        last_step: steps done at the last one; 0 before the first.
        now: seconds, of the same clock as ``last_at``, without the time that the run was paused.
        last_at: when the last one was written.
        config: says how many steps and minutes may lie between two.
    """
    late = now - last_at >= config.checkpoint_minutes * 60
    return step > last_step and (late or step - last_step >= config.checkpoint_steps)


def write(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint and drop all but the last two; return where it is.

    Whatever happens on the way, :func:`latest` finds this one or the one before.
    """
    name = folder / f"checkpoint-{checkpoint.step:09d}"
    aside = folder / f".{name.name}.writing"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    digest = write_tensors(aside / TENSORS, checkpoint.tensors)
    state = {
        "v": VERSION,
        "step": checkpoint.step,
        "epoch": checkpoint.epoch,
        "sha256": digest,
        "scalars": dict(checkpoint.scalars),
    }
    # The digest covers the state as well: half of it could be valid JSON of another run.
    text = json.dumps(state, sort_keys=True)
    sealed = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "state": text}
    with (aside / STATE).open("w", encoding="utf-8") as file:
        json.dump(sealed, file)
        _flush(file.fileno(), file)
    _sync_folder(aside)
    if name.exists():
        shutil.rmtree(name)
    aside.rename(name)
    _sync_folder(folder)
    _drop_old(folder)
    return name


def latest(folder: Path) -> Checkpoint | None:
    """Return the last checkpoint in ``folder`` whose digests fit; None if there is none."""
    for path in reversed(_found(folder)):
        try:
            return _read(path)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            continue
    return None


def clear(folder: Path) -> None:
    """Drop all checkpoints in ``folder``."""
    for path in _found(folder):
        shutil.rmtree(path)


def write_tensors(path: Path, tensors: Mapping[str, Array]) -> str:
    """Write arrays to one file, whole or not at all; return the sha256 of the file."""
    aside = path.with_name(f".{path.name}.writing")
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, aside)
    with aside.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    aside.replace(path)
    _sync_folder(path.parent)
    return digest


def read_tensors(path: Path) -> dict[str, Array]:
    """Return what :func:`write_tensors` wrote."""
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


def _drop_old(folder: Path) -> None:
    for path in _found(folder)[:-KEPT]:
        shutil.rmtree(path, ignore_errors=True)


def _flush(descriptor: int, file: Any) -> None:
    file.flush()
    os.fsync(descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
