"""Which version of a model serves, and which served before: the file ``current`` in its folder.

The file is replaced atomically, so readers need no lock; writers hold one, so that no change is lost.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from sutra_tasks.errors import ModelError, UnsupportedVersionError
from sutra_tasks.files import write_whole
from sutra_tasks.models.registry.version_files import READ_ONLY

__all__ = ["history_before", "locked", "read_history", "write_history"]

VERSION: Final = 1
CURRENT: Final = "current"
LOCK: Final = ".lock"
MAX_LENGTH: Final = 100
"""Versions that the history keeps at most."""


def read_history(model: str, folder: Path) -> list[int]:
    """Return the versions that served, in order; the last one serves now. Empty if none was promoted.

    Raises:
        ModelError: the file is damaged, or a link.
        UnsupportedVersionError: another release wrote it.
        OSError: it cannot be read.
    """
    path = folder / CURRENT
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ModelError(model, f"{path} is not a plain file; the registry holds files only")
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


def write_history(folder: Path, history: Sequence[int]) -> None:
    """Replace the file; the caller holds :func:`locked`.

    Raises:
        OSError: it cannot be written; the old one stays.
    """
    kept = list(history)[-MAX_LENGTH:]
    record = {"v": VERSION, "version": kept[-1], "history": kept}
    write_whole(folder / CURRENT, json.dumps(record).encode(), mode=READ_ONLY)


def history_before(history: Sequence[int], present: Collection[int]) -> list[int]:
    """Return the history that a rollback leaves: it ends at another version, one that still exists.

    Args:
        history: the versions that served, in order.
        present: the versions that the registry has.

    Returns:
        The beginning of ``history``; empty if no earlier version can serve.
    """
    before = list(history[:-1])
    while before and (before[-1] == history[-1] or before[-1] not in present):
        before.pop()
    return before


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Exclude all other threads and processes from changing which version of a model serves.

    Raises:
        OSError: the lock cannot be taken.
    """
    # Closing the descriptor releases the lock, and so does the end of the process.
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
