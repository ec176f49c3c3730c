"""The folder of the registry on disk.

::

    <folder>/<name>/3/                 one version: files that never change, and a manifest of them
    <folder>/<name>/current            which version serves, and which served before
    <folder>/<name>/.incoming-*        a version that is being written
    <folder>/<name>/.removed-2         an empty folder: version 2 was removed, its number is not reused
    <folder>/<name>/.lock              held while ``current`` is changed

No link is followed below the folder.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from sutra_tasks.errors import ModelError
from sutra_tasks.files import flush, sweep
from sutra_tasks.models.registry.names import check_model_name, is_model_name, parse_version

__all__ = ["ABANDONED_S", "RegistryFolder"]

INCOMING: Final = ".incoming-"
REMOVED: Final = ".removed-"
ABANDONED_S: Final = 86_400.0
"""Age in seconds at which a version that is still being written has lost its writer."""


class RegistryFolder:
    """The registry's folder; its methods raise :class:`ModelError` where files cannot be used."""

    def __init__(self, root: Path) -> None:
        """Take an existing folder."""
        self._root = root

    def names(self) -> list[str]:
        """Return the names of all folders that may be models."""
        with self.access("registry"):
            return [
                entry.name
                for entry in os.scandir(self._root)
                if is_model_name(entry.name) and entry.is_dir(follow_symlinks=False)
            ]

    def model(self, name: str) -> Path:
        """Return the folder of a model, which need not exist.

        Raises:
            InvalidOptionError: no model may have this name.
            ModelError: the folder is a link.
        """
        folder = self._root / check_model_name(name)
        if folder.is_symlink():
            raise ModelError(name, f"{folder} is a link; the registry holds folders only")
        return folder

    def numbers(self, name: str) -> list[int]:
        """Return the numbers of a model's versions, in ascending order."""
        folder = self.model(name)
        with self.access(name):
            if not folder.is_dir():
                self.check_root()
                return []
            entries = [entry for entry in os.scandir(folder) if parse_version(entry.name)]
        linked = [entry.name for entry in entries if entry.is_symlink()]
        if linked:
            raise ModelError(f"{name}@{linked[0]}", "is a link; the registry holds folders only")
        return sorted(int(entry.name) for entry in entries if entry.is_dir())

    def last_number(self, name: str) -> int:
        """Return the highest number that a version has or had; 0 if there was none."""
        removed = [path.name.removeprefix(REMOVED) for path in self.model(name).glob(f"{REMOVED}*")]
        return max([0, *self.numbers(name), *filter(None, map(parse_version, removed))])

    def version(self, name: str, version: int) -> Path:
        """Return the folder of a version.

        Raises:
            ModelError: there is no such version.
        """
        if version not in self.numbers(name):
            raise ModelError(f"{name}@{version}", self.what_exists(name))
        return self.model(name) / str(version)

    def what_exists(self, name: str) -> str:
        """Return a sentence for errors: which versions of a model the registry has."""
        numbers = ", ".join(map(str, self.numbers(name)))
        return f"The registry {self._root} has {'versions ' + numbers if numbers else 'none of it'}."

    def new_incoming(self, name: str, now: float) -> Path:
        """Return a new empty folder to write a version into, and delete abandoned ones."""
        folder = self.model(name)
        folder.mkdir(exist_ok=True)
        sweep(folder)
        for path in folder.glob(f"{INCOMING}*"):
            with suppress(OSError):  # another writer has just renamed or deleted it
                if now - path.lstat().st_mtime > ABANDONED_S:
                    shutil.rmtree(path)
        incoming = Path(tempfile.mkdtemp(prefix=INCOMING, dir=folder))
        incoming.chmod(0o755)  # other workers may run as other users
        return incoming

    def remove(self, name: str, version: int) -> None:
        """Delete a version's files; an empty folder keeps its number from being reused."""
        folder = self.version(name, version)
        removed = folder.with_name(f"{REMOVED}{version}")
        folder.rename(removed)
        for entry in list(removed.iterdir()):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        flush(removed.parent)

    def check_root(self) -> None:
        """Raise OSError if the registry's folder itself is missing."""
        self._root.stat()

    @contextmanager
    def access(self, model: str) -> Iterator[None]:
        """Turn an OSError of the block into a ModelError that says what to check."""
        try:
            yield
        except OSError as error:
            raise ModelError(
                model,
                f"the registry {self._root} cannot be used: {error.strerror or error}. Is the folder "
                "of SUTRA_MODELS_DIR there, may this user read and write it, and has the disk room?",
            ) from error
