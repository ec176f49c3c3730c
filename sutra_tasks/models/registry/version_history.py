"""Which version of a model serves, and which did before: a small file in the model's folder.

It is replaced in one step, so readers need no lock; who changes it holds one, so that no change is lost.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from sutra_tasks.errors import ModelError, UnsupportedVersionError
from sutra_tasks.models.registry.version_files import sync_folder, write_file

__all__ = ["locked", "read_history", "write_history"]

VERSION: Final = 1
CURRENT: Final = "current"
LOCK: Final = ".lock"
MOST: Final = 100


def read_history(model: str, home: Path) -> list[int]:
    """Return the versions that served, the one that does last; none where none was promoted.

    Raises:
        ModelError: the file is damaged, or a link.
        UnsupportedVersionError: another release wrote it.
        OSError: it cannot be read.
    """
    path = home / CURRENT
    if path.is_symlink():
        raise ModelError(model, f"{path} is a link; the registry holds files only")
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return []
    damaged = ModelError(model, f"{path} is damaged. Delete it, and promote a version again")
    try:
        record: Any = json.loads(text)
    except ValueError:
        raise damaged from None
    if not isinstance(record, dict):
        raise damaged
    if record.get("v") != VERSION:
        raise UnsupportedVersionError("a model's record", str(record.get("v"))[:20], VERSION)
    history = record.get("history")
    if not isinstance(history, list) or not all(type(one) is int and one > 0 for one in history):
        raise damaged
    if not history or history[-1] != record.get("version"):
        raise damaged
    return history


def write_history(home: Path, history: Sequence[int]) -> None:
    """Replace the file; only under :func:`locked`.

    Raises:
        OSError: it cannot be written; the old one stays.
    """
    kept = list(history)[-MOST:]
    aside = home / f".{CURRENT}"  # what is left of a writer that was killed is written over
    write_file(aside, json.dumps({"v": VERSION, "version": kept[-1], "history": kept}).encode())
    aside.replace(home / CURRENT)
    sync_folder(home)


@contextmanager
def locked(home: Path) -> Iterator[None]:
    """Be the only one, among processes and threads, that changes which version of a model serves.

    Raises:
        OSError: the lock cannot be taken.
    """
    # Closing lets go of it, and so does the end of a process, however it ends.
    descriptor = os.open(home / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
