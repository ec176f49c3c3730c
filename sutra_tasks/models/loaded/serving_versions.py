"""Which version of each model serves, as the registry said last.

Calls and heartbeats ask here and wait for no disk; the follower reads the registry again and again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from celery.utils.log import get_logger

from sutra_tasks.errors import SutraError
from sutra_tasks.models.registry.names import is_model_name, split_reference
from sutra_tasks.models.registry.resolve import resolve_model_name

if TYPE_CHECKING:
    from sutra_tasks.models.registry.model_registry import ModelRegistry
    from sutra_tasks.settings import Settings

__all__ = ["ServingVersions"]

logger = get_logger(__name__)


class ServingVersions:
    """See the module's docstring; safe to use from many threads."""

    def __init__(self, options: Settings, store: ModelRegistry | None) -> None:
        """Know the names that the deployment was given, and nothing of them yet."""
        self._options, self._store = options, store
        names = (options.model, *options.further_models)
        self._current: dict[str, int | None] = {name: None for name in names if is_model_name(name)}
        self._unreadable: set[str] = set()

    def of(self, name: str) -> str | None:
        """Return the version of a model that serves, ``name@3``, if one is known to."""
        version = self._current.get(name)
        return None if version is None else f"{name}@{version}"

    def serves(self, reference: str) -> bool:
        """Say whether a version is known to be the one of its model that serves."""
        found = split_reference(reference)
        return found is not None and self.of(found[0]) == reference

    def resolve(self, model: str) -> str:
        """Return what the registry and the settings mean by a name now, and follow it from then on.

        Raises:
            InvalidOptionError: no such model may be named.
            ModelError: there is no such version, none serves, or the registry cannot be read.
        """
        reference = resolve_model_name(model, self._options, self._store)
        found = split_reference(reference)
        if self._store is not None and found is not None:
            name, version = found
            if model == name:
                self._current[name] = version
            else:
                self._current.setdefault(name, None)
        return reference

    def refresh(self) -> None:
        """Read which versions serve; of a model that cannot be read, the one that was known goes on."""
        if self._store is None:
            return
        for name in list(self._current):
            try:
                self._current[name] = self._store.current(name)
                self._unreadable.discard(name)
            except SutraError as error:
                if name not in self._unreadable:
                    self._unreadable.add(name)
                    logger.warning("%s: which version serves cannot be read: %s", name, error)
