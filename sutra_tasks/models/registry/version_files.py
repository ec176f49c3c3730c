"""Files of a model: copied, brought to disk, and told apart by their sha256."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from sutra_tasks.errors import ModelError
from sutra_tasks.models.registry.manifest import MANIFEST

__all__ = ["copy_files", "file_digests", "sync_folder", "write_file"]

BLOCK_BYTES: Final = 1 << 20
READ_ONLY: Final = 0o444


def copy_files(model: str, source: Path, target: Path) -> tuple[dict[str, str], int]:
    """Copy a folder's files to disk for good, but its manifest; of a link to a file, the file.

    Returns:
        The sha256 of each by its path, and the bytes of all.

    Raises:
        ModelError: there are none, or something is not a plain file or folder.
        OSError: one cannot be read or written.
    """
    if not source.is_dir():
        raise ModelError(model, f"{source} is not a folder with a model")
    found, size = {}, 0
    for path in _plain(model, source, links=True):
        place = target / path.relative_to(source)
        for folder in reversed(place.relative_to(target).parents[:-1]):
            (target / folder).mkdir(exist_ok=True)
        digest = hashlib.sha256()
        with path.open("rb") as reading, place.open("xb") as writing:
            while block := reading.read(BLOCK_BYTES):
                digest.update(block)
                size += writing.write(block)
            _to_disk(writing)
        found[place.relative_to(target).as_posix()] = digest.hexdigest()
    if not found:
        raise ModelError(model, f"{source} holds no files")
    for folder in (path for path in target.rglob("*") if path.is_dir()):
        sync_folder(folder)
    return found, size


def file_digests(model: str, folder: Path) -> dict[str, str]:
    """Return the sha256 of each file of a folder by its path, but of its manifest.

    Raises:
        ModelError: something is a link, or not a plain file or folder.
        OSError: one cannot be read.
    """
    found = {}
    for path in _plain(model, folder, links=False):
        with path.open("rb") as file:
            found[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def write_file(path: Path, content: bytes) -> None:
    """Write a file to disk for good, over one that is there."""
    path.unlink(missing_ok=True)  # it may be read-only
    with path.open("xb") as file:
        file.write(content)
        _to_disk(file)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to disk for good."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fchmod(file.fileno(), READ_ONLY)
    os.fsync(file.fileno())


def _plain(model: str, root: Path, *, links: bool) -> Iterator[Path]:
    """Yield the files of a folder but its manifest."""
    for folder, folders, names in os.walk(root, onerror=_give_up):
        for path in (Path(folder, name) for name in sorted([*folders, *names])):
            if path == root / MANIFEST:
                continue
            if path.is_symlink() and (path.is_dir() or not links):
                raise ModelError(model, f"{path.relative_to(root)} is a link")
            if path.is_file():
                yield path
            elif not path.is_dir():
                raise ModelError(model, f"{path.relative_to(root)} is not a plain file")


def _give_up(error: OSError) -> None:
    raise error  # or a folder that cannot be read would be taken for an empty one
