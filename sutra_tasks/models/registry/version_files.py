"""The files of one version: copied into the registry, and recognised by their sha256."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from sutra_tasks.errors import ModelError
from sutra_tasks.files import flush
from sutra_tasks.models.registry.manifest import MANIFEST

__all__ = ["READ_ONLY", "copy_files", "file_digests"]

BLOCK_BYTES: Final = 1 << 20
READ_ONLY: Final = 0o444
"""Permissions of every file in the registry; other workers may run as other users."""


def copy_files(model: str, source: Path, target: Path) -> tuple[dict[str, str], int]:
    """Copy all files of a folder except its manifest, and flush them to disk.

    A link to a file is copied as that file.

    Returns:
        The sha256 of each file by its path, and the bytes of all files.

    Raises:
        ModelError: the folder has no files, or holds something that is not a plain file or folder.
        OSError: a file cannot be read or written.
    """
    if not source.is_dir():
        raise ModelError(model, f"{source} is not a folder with a model")
    found, size = {}, 0
    for path in _plain_files(model, source, links=True):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with path.open("rb") as reading, copy.open("xb") as writing:
            while block := reading.read(BLOCK_BYTES):
                digest.update(block)
                size += writing.write(block)
            os.fchmod(writing.fileno(), READ_ONLY)
        flush(copy)
        found[copy.relative_to(target).as_posix()] = digest.hexdigest()
    if not found:
        raise ModelError(model, f"{source} holds no files")
    for folder in (path for path in target.rglob("*") if path.is_dir()):
        flush(folder)
    return found, size


def file_digests(model: str, folder: Path) -> dict[str, str]:
    """Return the sha256 of each file of a folder, except its manifest, by the file's path.

    Raises:
        ModelError: something in the folder is a link, or not a plain file or folder.
        OSError: a file cannot be read.
    """
    found = {}
    for path in _plain_files(model, folder, links=False):
        with path.open("rb") as file:
            found[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _plain_files(model: str, root: Path, *, links: bool) -> Iterator[Path]:
    """Yield the files of a folder, except its manifest; ``links`` to files are allowed or refused."""
    for folder, folders, names in os.walk(root, onerror=_reraise):
        for path in (Path(folder, name) for name in sorted([*folders, *names])):
            if path == root / MANIFEST:
                continue
            if path.is_symlink() and (path.is_dir() or not links):
                raise ModelError(model, f"{path.relative_to(root)} is a link")
            if path.is_file():
                yield path
            elif not path.is_dir():
                raise ModelError(model, f"{path.relative_to(root)} is not a plain file")


def _reraise(error: OSError) -> None:
    raise error  # os.walk would take a folder that it cannot read for an empty one
