"""Atomic writes of files and folders: a reader finds the old content or the new, never half of it.

A writer creates a temporary file beside the final one, flushes it to disk, renames it, and flushes the
folder that holds the name. Any number of processes may write the same file. A writer that is killed
leaves only its temporary file, which :func:`sweep` deletes later.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from sutra_tasks.vectors import Floats

__all__ = [
    "flush",
    "read_array",
    "read_json",
    "replacing",
    "sweep",
    "write_array",
    "write_json",
    "write_whole",
]

TEMPORARY: Final = ".writing"
"""The suffix of temporary files and folders; their names begin with a dot."""
ABANDONED_S: Final = 3600.0
"""Age in seconds at which a temporary file has lost its writer."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; what the block creates there becomes ``path``.

    The block creates a file, or a folder whose files it flushes itself. If it raises, the temporary
    file is deleted and ``path`` stays as it was.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY}")
    try:
        yield temporary
        flush(temporary)  # or a power cut leaves a name without its content
        if path.is_dir():  # a rename replaces files and empty folders only
            shutil.rmtree(path)
        temporary.replace(path)
    except BaseException:
        _delete(temporary)
        raise
    flush(path.parent)


def write_whole(path: Path, content: bytes, *, mode: int | None = None) -> None:
    """Write a file, in place of one that exists.

    Args:
        path: of the file.
        content: all of it.
        mode: its permissions, whatever the umask is; None: those that the umask leaves.
    """
    with replacing(path) as temporary:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with os.fdopen(os.open(temporary, flags, 0o666 if mode is None else mode), "wb") as file:
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            file.write(content)


def flush(path: Path) -> None:
    """Flush a file's content, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(folder: Path) -> None:
    """Delete the temporary files and folders that killed writers left in a folder."""
    for path in folder.glob(f".*{TEMPORARY}"):
        with suppress(FileNotFoundError):  # its writer has just renamed it
            if time.time() - path.stat().st_mtime > ABANDONED_S:
                _delete(path)


def write_array(path: Path, array: Floats) -> None:
    """Write an array in float32."""
    buffer = io.BytesIO()
    np.save(buffer, array.astype(np.float32), allow_pickle=False)
    write_whole(path, buffer.getvalue())


def read_array(path: Path) -> Floats | None:
    """Return the array in a file; None if the file is missing or damaged."""
    try:
        found: Floats = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object as JSON."""
    write_whole(path, json.dumps(value).encode())


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; an empty one if the file is missing or damaged."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
