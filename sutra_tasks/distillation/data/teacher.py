"""The teacher: its name, its embedding space, and its engine, each loaded when it is first needed.

A scheduled run that finds nothing new needs only the name of the teacher's space. Loading the model for
that would cost minutes and gigabytes at each run, so the space is remembered on disk.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sutra_tasks.distillation.names import fingerprint
from sutra_tasks.engines.model_folder import locate
from sutra_tasks.errors import ModelError
from sutra_tasks.files import read_json, write_json
from sutra_tasks.models.loaded.loading import load_version
from sutra_tasks.models.registry.names import shown_name, split_reference
from sutra_tasks.models.registry.resolve import resolve_model_name

if TYPE_CHECKING:
    from sutra_tasks.engines.encoder import Encoder
    from sutra_tasks.models.registry.model_registry import ModelRegistry
    from sutra_tasks.settings import Settings

__all__ = ["Teacher", "model_folder"]

ENGINES: Final = ("sutra-tasks", "torch", "transformers", "sentence-transformers")
"""Packages whose releases may give the same files another space."""


def model_folder(reference: str, registry: ModelRegistry) -> Path:
    """Return the folder of a model, or its name if sentence-transformers has to find it."""
    if (version := split_reference(reference)) is not None:
        return registry.folder(*version)
    return Path(locate(reference))


class Teacher:
    """The model to learn from.

    Attributes:
        reference: its name as the deployment gives it; ``name@3`` for a version of the registry.
        name: the same for reports: without the folder on this machine, if ``reference`` is a path.
    """

    def __init__(
        self,
        name: str,
        options: Settings,
        registry: ModelRegistry,
        runs: Path,
        *,
        load: Callable[[Settings, ModelRegistry | None, str], Encoder] = load_version,
    ) -> None:
        """Resolve the teacher's name; loads nothing.

        Args:
            name: as recipes name it.
            options: the deployment's settings.
            registry: its registry.
            runs: the folder of all runs, where spaces are remembered.
            load: loads a model's engine.

        Raises:
            InvalidOptionError: recipes may not name this model.
        """
        self._options, self._registry, self._runs, self._load = options, registry, runs, load
        self.reference = resolve_model_name(name, options, registry, what="teacher")
        self.name = shown_name(self.reference)

    @cached_property
    def folder(self) -> Path:
        """Its folder, or its name if sentence-transformers has to find it."""
        return model_folder(self.reference, self._registry)

    @cached_property
    def space(self) -> str:
        """The embedding space of its vectors, from its manifest or as remembered for the same files.

        Raises:
            ModelError: the model had to be loaded to know its space, and cannot be.
        """
        if (version := split_reference(self.reference)) is not None:
            return self._registry.manifest(*version).space
        remembered = self._runs / f"space-{self._files_digest()[:16]}.json"
        found = read_json(remembered).get("space")
        if isinstance(found, str):
            return found
        space = self._loaded.info.space
        if self.folder.is_dir():
            remembered.parent.mkdir(parents=True, exist_ok=True)
            write_json(remembered, {"space": space})
        return space

    @cached_property
    def encoder(self) -> Encoder:
        """Its engine.

        Raises:
            ModelError: it cannot be loaded, or its space is no longer the remembered one.
        """
        if (found := self._loaded).info.space != self.space:
            raise ModelError(
                self.reference, f"gives the space {found.info.space}, and gave {self.space} before"
            )
        return found

    @cached_property
    def _loaded(self) -> Encoder:
        return self._load(self._options, self._registry, self.reference)

    def _files_digest(self) -> str:
        """Return a digest of the names, sizes and times of its files, and of the engines' releases."""
        folder = self.folder
        files = sorted(
            (str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns)
            for path in folder.rglob("*")
            if path.is_file()
        )
        return fingerprint([str(folder), files, [importlib.metadata.version(name) for name in ENGINES]])
