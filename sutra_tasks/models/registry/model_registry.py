"""The registry of models: a folder that all workers share, with immutable, numbered versions.

A version is copied into a temporary folder, flushed to disk and renamed, so it exists whole or not at
all. :mod:`sutra_tasks.models.registry.layout` shows the folder.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path

from sutra_tasks.errors import ModelError, SutraError, UnsupportedVersionError
from sutra_tasks.files import flush, write_whole
from sutra_tasks.models.registry.layout import RegistryFolder
from sutra_tasks.models.registry.manifest import (
    MANIFEST,
    Manifest,
    VersionFacts,
    newest_of_space,
)
from sutra_tasks.models.registry.names import check_model_name, parse_version
from sutra_tasks.models.registry.version_files import READ_ONLY, copy_files, file_digests
from sutra_tasks.models.registry.version_history import (
    history_before,
    locked,
    read_history,
    write_history,
)

__all__ = ["ModelRegistry"]


class ModelRegistry:
    """The models of a deployment; safe to use from many threads and processes.

    Every method raises :class:`ModelError` where the folder is missing or cannot be read or written, and
    :class:`InvalidOptionError` for a name that no model may have.
    """

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.time) -> None:
        """Open a registry.

        Args:
            folder: an existing folder.
            clock: gives seconds since 1970.
        """
        self._folder, self._clock = RegistryFolder(folder), clock

    def names(self) -> tuple[str, ...]:
        """Return the models that have a version, in alphabetical order; damaged ones are included."""
        return tuple(sorted(name for name in self._folder.names() if self._is_listed(name)))

    def has(self, name: str) -> bool:
        """Return whether a model has a version."""
        return bool(self._folder.numbers(name))

    def versions(self, name: str) -> list[Manifest]:
        """Return the manifests of a model's versions, oldest first; none if there is no such model.

        Raises:
            ModelError: a manifest is damaged.
            UnsupportedVersionError: another release wrote one.
        """
        return [self.manifest(name, number) for number in self._folder.numbers(name)]

    def inspect(self, name: str) -> list[Manifest | SutraError]:
        """Return for each version of a model its manifest, or why it cannot be read; oldest first."""
        found: list[Manifest | SutraError] = []
        for number in self._folder.numbers(name):
            try:
                found.append(self.manifest(name, number))
            except (ModelError, UnsupportedVersionError) as error:
                found.append(error)
        return found

    def folder(self, name: str, version: int) -> Path:
        """Return the folder of a version.

        Raises:
            ModelError: there is no such version.
        """
        return self._folder.version(name, version)

    def manifest(self, name: str, version: int) -> Manifest:
        """Return the manifest of a version.

        Raises:
            ModelError: there is no such version, or its manifest is damaged.
            UnsupportedVersionError: another release wrote it.
        """
        path = self.folder(name, version) / MANIFEST
        with self._folder.access(f"{name}@{version}"):
            if path.is_symlink() or (path.exists() and not path.is_file()):
                raise ModelError(f"{name}@{version}", f"its manifest {path} is not a plain file")
            found = Manifest.from_json(path.read_bytes())
        if (found.name, found.version) != (name, version):
            raise ModelError(f"{name}@{version}", f"its manifest is of {found.name}@{found.version}")
        return found

    def resolve(self, reference: str) -> tuple[str, int]:
        """Return the model and version that ``name`` (the version that serves) or ``name@3`` means.

        Raises:
            ModelError: there is no such version, or none serves.
        """
        name, at, number = reference.partition("@")
        check_model_name(name)
        version = parse_version(number) if at else self.current(name)
        if version is None and at:
            raise ModelError(reference[:80], "a version is a whole number, as in name@3")
        if version is None:
            known = self._folder.what_exists(name)
            raise ModelError(name, f"none of it serves. {known} `sutra models promote`")
        self.folder(name, version)
        return name, version

    def by_space(self, name: str, space: str) -> int | None:
        """Return the newest version that gives vectors of a space, or of which it is a narrower cut.

        A version whose manifest cannot be read is skipped.
        """
        numbers = self._folder.numbers(name)
        return newest_of_space([one for n in numbers if (one := self._readable(name, n))], space)

    def verify(self, name: str, version: int) -> Manifest:
        """Compare all files of a version with its manifest, and return the manifest.

        Raises:
            ModelError: a file differs, is missing, or is not in the manifest.
        """
        manifest, folder = self.manifest(name, version), self.folder(name, version)
        expected = manifest.files
        with self._folder.access(f"{name}@{version}"):
            found = file_digests(f"{name}@{version}", folder)
        for path in sorted({*expected, *found}):
            if expected.get(path) != found.get(path):
                changed = "was changed" if path in found else "is missing"
                what = changed if path in expected else "was not there when it was added"
                raise ModelError(f"{name}@{version}", f"its file {path} {what}. Add the model again")
        return manifest

    def add(self, name: str, source: Path, facts: VersionFacts) -> Manifest:
        """Copy a sentence-transformers folder into the registry as the next version of a model.

        The version serves only after :meth:`promote`.

        Raises:
            ModelError: the source has no files, or files that are not plain; nothing was added.
        """
        with self._folder.access(name):
            incoming = self._folder.new_incoming(name, self._clock())
            try:
                files, size = copy_files(name, source, incoming)
                return self._enter(name, incoming, facts, files, size)
            except BaseException:
                shutil.rmtree(incoming, ignore_errors=True)
                raise

    def _enter(
        self, name: str, incoming: Path, facts: VersionFacts, files: dict[str, str], size: int
    ) -> Manifest:
        """Write the manifest and give the folder the next free number."""
        given = {option.name: getattr(facts, option.name) for option in fields(VersionFacts)}
        given |= {"name": name, "created_at": self._clock(), "files": files, "bytes": size}
        number = self._folder.last_number(name)
        while True:
            number += 1
            manifest, target = Manifest(**given, version=number), incoming.with_name(str(number))
            written = manifest.to_json()
            Manifest.from_json(written)  # refuses what could not be read
            write_whole(incoming / MANIFEST, written.encode(), mode=READ_ONLY)
            try:
                incoming.rename(target)
            except OSError:
                if not target.exists():
                    raise
                continue  # another writer took the number
            flush(target.parent)
            return manifest

    def current(self, name: str) -> int | None:
        """Return the version that serves, if any was promoted."""
        return next(iter(self._history(name)[-1:]), None)

    def promote(self, name: str, version: int) -> int | None:
        """Make a version the one that serves; return the version that served before, if any.

        :mod:`sutra_tasks.models.rollout.gate` decides whether it may.

        Raises:
            ModelError: there is no such version.
        """
        with self._changing(name):
            self.manifest(name, version)
            history = self._history(name)
            if history[-1:] != [version]:
                write_history(self._folder.model(name), [*history, version])
            return next(iter(history[-1:]), None)

    def previous(self, name: str) -> int:
        """Return the version that :meth:`rollback` would make the one that serves.

        Raises:
            ModelError: there is none.
        """
        return self._history_before(name)[-1]

    def rollback(self, name: str) -> int:
        """Make the version that served before serve again; return it.

        Raises:
            ModelError: there is none.
        """
        with self._changing(name):
            history = self._history_before(name)
            write_history(self._folder.model(name), history)
            return history[-1]

    def remove(self, name: str, version: int) -> None:
        """Delete a version; its number is not reused.

        Raises:
            ModelError: it serves, or there is no such version.
        """
        with self._changing(name):
            self.folder(name, version)
            if self.current(name) == version:
                raise ModelError(f"{name}@{version}", "it serves. Promote another version first")
            self._folder.remove(name, version)

    def _is_listed(self, name: str) -> bool:
        try:
            return self.has(name)
        except ModelError:
            return True  # an error of one model is raised to callers who ask for that model

    def _readable(self, name: str, version: int) -> Manifest | None:
        with suppress(ModelError, UnsupportedVersionError):
            return self.manifest(name, version)
        return None

    def _history(self, name: str) -> list[int]:
        with self._folder.access(name):
            history = read_history(name, self._folder.model(name))
            if not history:
                self._folder.check_root()
        return history

    def _history_before(self, name: str) -> list[int]:
        history = history_before(self._history(name), self._folder.numbers(name))
        if not history:
            raise ModelError(name, "no version of it served before the one that does now")
        return history

    @contextmanager
    def _changing(self, name: str) -> Iterator[None]:
        """Lock which version of a model serves, so that no concurrent change is lost."""
        folder = self._folder.model(name)
        with self._folder.access(name):
            if not folder.is_dir():
                raise ModelError(name, self._folder.what_exists(name))
            with locked(folder):
                yield
