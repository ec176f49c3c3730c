"""Files of a run: written whole or not at all, whoever else writes them at the same time."""

from __future__ import annotations

import io
import json
import os
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from sutra_tasks.vectors import Floats

__all__ = ["WRITING", "read_array", "read_json", "sweep", "write_array", "write_json", "write_whole"]

WRITING: Final = ".writing"
"""The end of the name under which a file is written before it is renamed."""
ABANDONED_S: Final = 3600.0
"""Seconds after which nobody writes a file any more."""


def write_whole(path: Path, content: bytes, *, mode: int = 0o666) -> None:
    """Write a file to disk for good, over one that is there.

    Args:
        path: where.
        content: of it.
        mode: who may read and write it, less the umask.
    """
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}{WRITING}")
    try:
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # or a power cut leaves a name without its content
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def sweep(folder: Path) -> None:
    """Delete what writers that were killed left in a folder."""
    for path in folder.glob(f".*{WRITING}"):
        with suppress(FileNotFoundError):  # its writer has renamed it
            if path.is_file() and time.time() - path.stat().st_mtime > ABANDONED_S:
                path.unlink()


def write_array(path: Path, array: Floats) -> None:
    """Write an array in float32."""
    held = io.BytesIO()
    np.save(held, array.astype(np.float32), allow_pickle=False)
    write_whole(path, held.getvalue())


def read_array(path: Path) -> Floats | None:
    """Return the array in a file; None if there is none, or it is damaged."""
    try:
        found: Floats = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object."""
    write_whole(path, json.dumps(value).encode())


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a file; an empty one if there is none, or it is damaged."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
