"""Names of models, and ``name@3``: how calls, settings and devices name a version of one."""

from __future__ import annotations

import re
from typing import Final

from sutra_tasks.errors import InvalidOptionError

__all__ = ["bare_name", "check_model_name", "is_model_name", "split_reference"]

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_NUMBER: Final = re.compile(r"[1-9][0-9]{0,8}")


def check_model_name(name: str) -> str:
    """Return ``name`` if a model of the registry may have it.

    Raises:
        InvalidOptionError: it may not.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or ".." in name:
        raise InvalidOptionError(
            "name", repr(name)[:80], "letters, digits, '-', '_' and '.', 64 at most"
        )
    return name


def is_model_name(value: object) -> bool:
    """Say whether a model of the registry may have this name."""
    try:
        return bool(check_model_name(value))  # type: ignore[arg-type] # it refuses what is no text
    except InvalidOptionError:
        return False


def split_reference(reference: str) -> tuple[str, int] | None:
    """Return the model and version that ``name@3`` says; None of anything else, such as a path."""
    name, _, number = reference.partition("@")
    if not is_model_name(name) or not _NUMBER.fullmatch(number):
        return None
    return name, int(number)


def bare_name(reference: str) -> str:
    """Return the model's name: that of ``name@3`` without its version, any other as it is."""
    found = split_reference(reference)
    return reference if found is None else found[0]
