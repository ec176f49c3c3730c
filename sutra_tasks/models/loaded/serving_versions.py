"""Which version of each model serves, as last read from the registry.

Calls and heartbeats read this copy, so they never wait for the registry's disk; the follower refreshes
it every half second.
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
    """The serving version of each model that this device follows; safe to use from many threads."""

    def __init__(self, options: Settings, registry: ModelRegistry | None) -> None:
        """Follow the models of the settings; no version is known before :meth:`refresh`."""
        self._options, self._registry = options, registry
        names = (options.model, *options.further_models)
        self._current: dict[str, int | None] = {name: None for name in names if is_model_name(name)}
        self._unreadable: set[str] = set()

    def of(self, name: str) -> str | None:
        """Return the version of a model that serves, as ``name@3``; None if none is known."""
        version = self._current.get(name)
        return None if version is None else f"{name}@{version}"

    def serves(self, reference: str) -> bool:
        """Return whether ``name@3`` is known to be the version of its model that serves."""
        found = split_reference(reference)
        return found is not None and self.of(found[0]) == reference

    def resolve(self, model: str) -> str:
        """Return the reference that a caller's name refers to, and follow that model from now on.

        Reads the registry.

        Raises:
            InvalidOptionError: callers may not name this model.
            ModelError: there is no such version, none serves, or the registry cannot be read.
        """
        reference = resolve_model_name(model, self._options, self._registry)
        found = split_reference(reference)
        if self._registry is not None and found is not None:
            name, version = found
            if model == name:
                self._current[name] = version
            else:
                self._current.setdefault(name, None)
        return reference

    def refresh(self) -> None:
        """Read which versions serve; a model that cannot be read keeps the version that is known."""
        if self._registry is None:
            return
        for name in list(self._current):
            try:
                self._current[name] = self._registry.current(name)
                self._unreadable.discard(name)
            except SutraError as error:
                if name not in self._unreadable:
                    self._unreadable.add(name)
                    logger.warning("%s: which version serves cannot be read: %s", name, error)
