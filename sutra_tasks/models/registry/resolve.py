"""Which models a caller may name, and the registry of this deployment."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sutra_tasks.errors import InvalidOptionError, ModelError
from sutra_tasks.models.registry.model_registry import ModelRegistry
from sutra_tasks.models.registry.names import is_model_name, split_reference

if TYPE_CHECKING:
    from sutra_tasks.settings import Settings

__all__ = ["open_registry", "resolve_model_name"]


def open_registry(options: Settings) -> ModelRegistry | None:
    """Return the registry of models, its folder made if need be; None if the deployment has none.

    Raises:
        ModelError: the folder cannot be made.
    """
    if options.models_dir is None:
        return None
    folder = Path(options.models_dir).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"SUTRA_MODELS_DIR={folder} cannot be made: {error.strerror}"
        raise ModelError("of the registry", reason) from None
    return ModelRegistry(folder)


def resolve_model_name(
    model: str, options: Settings, store: ModelRegistry | None, *, what: str = "model"
) -> str:
    """Return which model is meant by a name from a caller: never a path the deployment did not name.

    Args:
        model: the name.
        options: the deployment's, with the models that may be named.
        store: the registry, whose models may be named too.
        what: the option that holds the name.

    Returns:
        The name; of the registry with its version, ``name@3``.

    Raises:
        InvalidOptionError: none that may be named.
        ModelError: one of the registry that has no such version, or none that serves.
    """
    known = (options.model, *options.further_models)
    if store is not None and _is_of_registry(model, store, configured=model in known):
        name, version = store.resolve(model)
        return f"{name}@{version}"
    if model in known:
        return model
    kept = store.names() if store is not None else ()
    shown = ", ".join(sorted({*known, *kept}))
    raise InvalidOptionError(what, repr(model)[:80], f"one of {shown} (SUTRA_MODELS names more)")


def _is_of_registry(model: str, store: ModelRegistry, *, configured: bool) -> bool:
    """Say whether a name means the registry's model; a configured one may be there by chance."""
    name, at, _ = model.partition("@")
    if not is_model_name(name) or not store.has(name):
        return False
    if not configured:
        return True
    # A path may hold an @; and a version that was only added must not take a configured name over.
    return split_reference(model) is not None if at else store.current(name) is not None
