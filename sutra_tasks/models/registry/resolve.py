"""Finds the registry of this deployment, and what a model name from a caller refers to."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sutra_tasks.errors import InvalidOptionError, ModelError
from sutra_tasks.models.registry.model_registry import ModelRegistry
from sutra_tasks.models.registry.names import is_model_name, split_reference

if TYPE_CHECKING:
    from sutra_tasks.settings import Settings

__all__ = ["open_registry", "resolve_model_name"]

STORAGE_S: Final = 10.0
"""Seconds that the registry's storage may take to answer at the start."""


def open_registry(options: Settings) -> ModelRegistry | None:
    """Return the registry of models; None if the deployment has none.

    Its folder is created if it does not exist.

    Raises:
        ModelError: the folder cannot be created, or its storage does not answer.
    """
    if options.models_dir is None:
        return None
    folder = Path(options.models_dir).expanduser()
    made: Future[None] = Future()
    threading.Thread(target=_make, args=(folder, made), daemon=True).start()
    try:
        made.result(STORAGE_S)
    except OSError as error:
        reason = f"cannot be made: {error.strerror}"
        if not made.done():
            reason = f"does not answer for {STORAGE_S:.0f} s: does its storage hang?"
        raise ModelError("of the registry", f"SUTRA_MODELS_DIR={folder} {reason}") from None
    return ModelRegistry(folder)


def _make(folder: Path, made: Future[None]) -> None:
    """Create a folder on a thread of its own, which is all that hangs with the folder's storage."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        made.set_exception(error)
    else:
        made.set_result(None)


def resolve_model_name(
    model: str, options: Settings, registry: ModelRegistry | None, *, what: str = "model"
) -> str:
    """Return the reference of the model that a caller's name refers to.

    A caller can name the models of the settings and of the registry, never a path of its own.

    Args:
        model: the name.
        options: the deployment's settings, with the models that callers may name.
        registry: the registry, if there is one.
        what: the option that holds the name, for errors.

    Returns:
        ``name@3`` for a model of the registry; the name itself for any other.

    Raises:
        InvalidOptionError: callers may not name this model.
        ModelError: the registry's model has no such version, or none that serves.
    """
    configured = (options.model, *options.further_models)
    if registry is not None and _is_in_registry(model, registry, configured=model in configured):
        name, version = registry.resolve(model)
        return f"{name}@{version}"
    if model in configured:
        return model
    registered = registry.names() if registry is not None else ()
    known = ", ".join(sorted({*configured, *registered}))
    raise InvalidOptionError(what, repr(model)[:80], f"one of {known} (SUTRA_MODELS names more)")


def _is_in_registry(model: str, registry: ModelRegistry, *, configured: bool) -> bool:
    """Return whether a name refers to the registry; a name of the settings may only look like it."""
    name, at, _ = model.partition("@")
    if not is_model_name(name) or not registry.has(name):
        return False
    if not configured:
        return True
    # A path may hold an @; and a version that was never promoted must not take over a configured name.
    return split_reference(model) is not None if at else registry.current(name) is not None
