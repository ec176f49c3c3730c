"""The model to learn from: loaded where it is needed, and known before.

A scheduled run that finds nothing new needs the name of its teacher's space and nothing else; loading a
model for that would cost minutes and gigabytes each time.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sutra_tasks.distillation.data.vector_cache import digest
from sutra_tasks.engines.model_folder import locate
from sutra_tasks.errors import ModelError
from sutra_tasks.files import read_json, write_json
from sutra_tasks.models.loaded.loading import load_version
from sutra_tasks.models.registry.names import split_reference
from sutra_tasks.models.registry.resolve import resolve_model_name

if TYPE_CHECKING:
    from sutra_tasks.engines.encoder import Encoder
    from sutra_tasks.models.registry.model_registry import ModelRegistry
    from sutra_tasks.settings import Settings

__all__ = ["Teacher", "place_of"]

ENGINES: Final = ("sutra-tasks", "torch", "transformers", "sentence-transformers")
"""Packages whose releases may give the same files another space."""


def place_of(reference: str, registry: ModelRegistry) -> Path:
    """Return the folder of a model, or its name where sentence-transformers must find it."""
    if (version := split_reference(reference)) is not None:
        return registry.folder(*version)
    return Path(locate(reference))


class Teacher:
    """See the module's docstring.

    Attributes:
        reference: its name; of the registry with its version, ``name@3``.
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
        """Name it.

        Args:
            name: as recipes name it.
            options: of this deployment.
            registry: the registry.
            runs: the folder of all runs, where spaces are remembered.
            load: loads it.

        Raises:
            InvalidOptionError: no such model may be named.
        """
        self._options, self._registry, self._runs, self._load = options, registry, runs, load
        self.reference = resolve_model_name(name, options, registry, what="teacher")

    @cached_property
    def place(self) -> Path:
        """Its folder."""
        return place_of(self.reference, self._registry)

    @cached_property
    def space(self) -> str:
        """The space of its vectors: as the registry says, or as it was when its files were last loaded.

        Raises:
            ModelError: it had to be loaded for that, and cannot be.
        """
        if (version := split_reference(self.reference)) is not None:
            return self._registry.manifest(*version).space
        known = self._runs / f"space-{self._files()[:16]}.json"
        found = read_json(known).get("space")
        if isinstance(found, str):
            return found
        space = self._loaded.info.space
        if self.place.is_dir():
            known.parent.mkdir(parents=True, exist_ok=True)
            write_json(known, {"space": space})
        return space

    @cached_property
    def encoder(self) -> Encoder:
        """Its engine.

        Raises:
            ModelError: it cannot be loaded, or has become another model.
        """
        if (found := self._loaded).info.space != self.space:
            raise ModelError(
                self.reference, f"gives the space {found.info.space}, and gave {self.space} before"
            )
        return found

    @cached_property
    def _loaded(self) -> Encoder:
        return self._load(self._options, self._registry, self.reference)

    def _files(self) -> str:
        """Return a digest of what decides its space, by names, sizes and times, not by contents."""
        place = self.place
        files = sorted(
            (str(path.relative_to(place)), path.stat().st_size, path.stat().st_mtime_ns)
            for path in place.rglob("*")
            if path.is_file()
        )
        return digest([str(place), files, [importlib.metadata.version(name) for name in ENGINES]])
