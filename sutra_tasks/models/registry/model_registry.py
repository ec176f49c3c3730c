"""The registry of models: a folder that all workers share.

::

    <folder>/<name>/3/                 one version: files that never change, and a manifest of them
    <folder>/<name>/current            which version serves, and which did before
    <folder>/<name>/.incoming-*        a version that is being written
    <folder>/<name>/.removed-2         an empty folder: this number is not given again
    <folder>/<name>/.lock              held while ``current`` is changed

A version is written aside, brought to disk and renamed, so it is there whole or not at all. No link is
followed below the folder.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Final

from sutra_tasks.errors import ModelError, UnsupportedVersionError
from sutra_tasks.models.registry.manifest import (
    MANIFEST,
    Manifest,
    VersionFacts,
    newest_of_space,
)
from sutra_tasks.models.registry.names import check_model_name, is_model_name
from sutra_tasks.models.registry.version_files import copy_files, file_digests, sync_folder, write_file
from sutra_tasks.models.registry.version_history import locked, read_history, write_history

__all__ = ["ModelRegistry"]

INCOMING: Final = ".incoming-"
REMOVED: Final = ".removed-"
ABANDONED_S: Final = 86_400.0
"""A version that was begun so long ago is not being written any more."""

_NUMBER: Final = re.compile(r"[1-9][0-9]{0,8}")


class ModelRegistry:
    """See the module's docstring; safe to use from many threads and processes.

    Every method raises :class:`ModelError` where the folder is missing or cannot be read or written, and
    :class:`InvalidOptionError` for a name that no model may have.
    """

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.time) -> None:
        """Take an existing folder; ``clock`` gives seconds since 1970."""
        self._folder, self._clock = folder, clock

    def names(self) -> tuple[str, ...]:
        """Return the models that have a version, in alphabetical order; so do those that are damaged."""
        with self._access("registry"):
            homes = [entry.name for entry in os.scandir(self._folder) if _is_home(entry)]
        return tuple(sorted(name for name in homes if self._is_listed(name)))

    def has(self, name: str) -> bool:
        """Say whether a model has a version."""
        return bool(self._numbers(name))

    def versions(self, name: str) -> list[Manifest]:
        """Return the manifests of a model's versions, oldest first; none if there is no such model.

        Raises:
            ModelError: one is damaged.
            UnsupportedVersionError: another release wrote one.
        """
        return [self.manifest(name, number) for number in self._numbers(name)]

    def folder(self, name: str, version: int) -> Path:
        """Return the folder of a version.

        Raises:
            ModelError: there is no such version.
        """
        if version not in self._numbers(name):
            raise ModelError(f"{name}@{version}", self._absent(name))
        return self._home(name) / str(version)

    def manifest(self, name: str, version: int) -> Manifest:
        """Return what the registry says of a version.

        Raises:
            ModelError: there is no such version, or its manifest is damaged.
            UnsupportedVersionError: another release wrote it.
        """
        path = self.folder(name, version) / MANIFEST
        if path.is_symlink():
            raise ModelError(f"{name}@{version}", "its manifest is a link")
        with self._access(f"{name}@{version}"):
            found = Manifest.from_json(path.read_bytes())
        if (found.name, found.version) != (name, version):
            raise ModelError(f"{name}@{version}", f"its manifest is of {found.name}@{found.version}")
        return found

    def resolve(self, reference: str) -> tuple[str, int]:
        """Return the model and version that ``name`` (the one that serves) or ``name@3`` means.

        Raises:
            ModelError: there is no such version, or none serves.
        """
        name, at, number = reference.partition("@")
        check_model_name(name)
        if not at:
            version = self.current(name)
            if version is None:
                raise ModelError(name, f"none of it serves. {self._absent(name)} `sutra models promote`")
        elif not _NUMBER.fullmatch(number):
            raise ModelError(reference[:80], "a version is a whole number, as in name@3")
        else:
            version = int(number)
        self.folder(name, version)
        return name, version

    def by_space(self, name: str, space: str) -> int | None:
        """Return the newest version that gives vectors of a space, or of which it is a narrower cut.

        One whose manifest cannot be read is passed over.
        """
        versions = [one for number in self._numbers(name) if (one := self._readable(name, number))]
        return newest_of_space(versions, space)

    def current(self, name: str) -> int | None:
        """Return the version that serves, if one was promoted."""
        return next(iter(self._history(name)[-1:]), None)

    def add(self, name: str, source: Path, facts: VersionFacts) -> Manifest:
        """Copy a sentence-transformers folder into the registry as the next version of a model.

        It serves when it is promoted. What fails leaves no version that is half there.

        Raises:
            ModelError: the source has no files, or ones that are not plain.
        """
        home = self._home(name)
        with self._access(name):
            home.mkdir(exist_ok=True)
            self._drop_abandoned(home)
            incoming = Path(tempfile.mkdtemp(prefix=INCOMING, dir=home))
            try:
                incoming.chmod(0o755)  # other workers may run as other users
                files, size = copy_files(name, source, incoming)
                return self._enter(name, incoming, facts, files, size)
            except BaseException:
                shutil.rmtree(incoming, ignore_errors=True)
                raise

    def _enter(
        self, name: str, incoming: Path, facts: VersionFacts, files: dict[str, str], size: int
    ) -> Manifest:
        given = {option.name: getattr(facts, option.name) for option in fields(VersionFacts)}
        given |= {"name": name, "created_at": self._clock(), "files": files, "bytes": size}
        home, number = incoming.parent, self._last_number(name)
        while True:
            number += 1
            manifest = Manifest(**given, version=number)
            written = manifest.to_json()
            Manifest.from_json(written)  # refuses what could not be read
            write_file(incoming / MANIFEST, written.encode())
            sync_folder(incoming)
            try:
                incoming.rename(home / str(number))
            except OSError:
                if not (home / str(number)).exists():
                    raise
                continue  # another writer was quicker
            sync_folder(home)
            return manifest

    def promote(self, name: str, version: int) -> int | None:
        """Have a version serve; return the one that did before, if any.

        Whether it may is decided before: see :mod:`sutra_tasks.models.rollout.gate`.

        Raises:
            ModelError: there is no such version.
        """
        with self._changing(name):
            self.manifest(name, version)
            history = self._history(name)
            if history[-1:] != [version]:
                write_history(self._home(name), [*history, version])
            return next(iter(history[-1:]), None)

    def rollback(self, name: str) -> int:
        """Have the version serve that did before the one that does; return it.

        Raises:
            ModelError: there is none, or it was removed.
        """
        with self._changing(name):
            present, history = self._numbers(name), self._history(name)
            before = history[:-1]
            while before and (before[-1] == history[-1] or before[-1] not in present):
                before.pop()
            if not before:
                raise ModelError(name, "no version of it served before the one that does now")
            write_history(self._home(name), before)
            return before[-1]

    def verify(self, name: str, version: int) -> Manifest:
        """Compare all files of a version with its manifest, and return that.

        Raises:
            ModelError: one differs, is missing, or is there beyond those listed.
        """
        manifest, place = self.manifest(name, version), self.folder(name, version)
        expected = manifest.files
        with self._access(f"{name}@{version}"):
            found = file_digests(f"{name}@{version}", place)
        for path in sorted({*expected, *found}):
            if expected.get(path) != found.get(path):
                changed = "was changed" if path in found else "is missing"
                what = changed if path in expected else "was not there when it was added"
                raise ModelError(f"{name}@{version}", f"its file {path} {what}. Add the model again")
        return manifest

    def remove(self, name: str, version: int) -> None:
        """Delete a version; its number is not given again.

        Raises:
            ModelError: it serves, or there is no such version.
        """
        with self._changing(name):
            place = self.folder(name, version)
            if self.current(name) == version:
                raise ModelError(f"{name}@{version}", "it serves. Promote another version first")
            gone = place.with_name(f"{REMOVED}{version}")
            place.rename(gone)
            for entry in list(gone.iterdir()):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            sync_folder(gone.parent)

    def _is_listed(self, name: str) -> bool:
        try:
            return self.has(name)
        except ModelError:
            return True  # what is wrong with it is told to who asks for it, not to all

    def _readable(self, name: str, version: int) -> Manifest | None:
        with suppress(ModelError, UnsupportedVersionError):
            return self.manifest(name, version)
        return None

    def _home(self, name: str) -> Path:
        home = self._folder / check_model_name(name)
        if home.is_symlink():
            raise ModelError(name, f"{home} is a link; the registry holds folders only")
        return home

    def _numbers(self, name: str) -> list[int]:
        home = self._home(name)
        with self._access(name):
            if not home.is_dir():
                self._folder.stat()  # where the registry itself is missing, say so
                return []
            entries = [entry for entry in os.scandir(home) if _NUMBER.fullmatch(entry.name)]
        linked = [entry.name for entry in entries if entry.is_symlink()]
        if linked:
            raise ModelError(f"{name}@{linked[0]}", "is a link; the registry holds folders only")
        return sorted(int(entry.name) for entry in entries if entry.is_dir())

    def _last_number(self, name: str) -> int:
        removed = [path.name.removeprefix(REMOVED) for path in self._home(name).glob(f"{REMOVED}*")]
        return max([0, *self._numbers(name), *(int(n) for n in removed if _NUMBER.fullmatch(n))])

    def _absent(self, name: str) -> str:
        numbers = ", ".join(map(str, self._numbers(name)))
        return f"The registry {self._folder} has {'versions ' + numbers if numbers else 'none of it'}."

    def _drop_abandoned(self, home: Path) -> None:
        for path in home.glob(f"{INCOMING}*"):
            with suppress(OSError):  # another writer was quicker
                if self._clock() - path.lstat().st_mtime > ABANDONED_S:
                    shutil.rmtree(path)

    def _history(self, name: str) -> list[int]:
        with self._access(name):
            history = read_history(name, self._home(name))
            if not history:
                self._folder.stat()  # where the registry itself is missing, say so
        return history

    @contextmanager
    def _changing(self, name: str) -> Iterator[None]:
        home = self._home(name)
        with self._access(name):
            if not home.is_dir():
                raise ModelError(name, self._absent(name))
            with locked(home):
                yield

    @contextmanager
    def _access(self, model: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ModelError(
                model,
                f"the registry {self._folder} cannot be used: {error.strerror or error}. Is the folder "
                "of SUTRA_MODELS_DIR there, may this user read and write it, and has the disk room?",
            ) from error


def _is_home(entry: os.DirEntry[str]) -> bool:
    return is_model_name(entry.name) and entry.is_dir(follow_symlinks=False)
