"""``name@3``: how calls, settings and devices name a version of a model of the registry."""

from __future__ import annotations

import re
from typing import Final

from sutra_tasks.models.manifest import is_model_name

__all__ = ["bare_name", "version_of"]

_NUMBER: Final = re.compile(r"[1-9][0-9]{0,8}")


def version_of(reference: str) -> tuple[str, int] | None:
    """Return the model and version that ``name@3`` says; None of anything else, such as a path."""
    name, _, number = reference.partition("@")
    if not is_model_name(name) or not _NUMBER.fullmatch(number):
        return None
    return name, int(number)


def bare_name(reference: str) -> str:
    """Return the model's name: that of ``name@3`` without its version, any other as it is."""
    found = version_of(reference)
    return reference if found is None else found[0]
