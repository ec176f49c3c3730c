"""Names of models, and references such as ``name@3``, which name one version of a model."""

from __future__ import annotations

import re
from typing import Final

from sutra_tasks.errors import InvalidOptionError

__all__ = [
    "bare_name",
    "check_model_name",
    "is_model_name",
    "is_path",
    "parse_version",
    "shown_name",
    "split_reference",
]

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_NUMBER: Final = re.compile(r"[1-9][0-9]{0,8}")
_IN_HUB_CACHE: Final = re.compile(r"models--([^/\\]+?)--([^/\\]+)")


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
    """Return whether a model of the registry may have this name."""
    try:
        return bool(check_model_name(value))  # type: ignore[arg-type] # it refuses what is no text
    except InvalidOptionError:
        return False


def parse_version(text: str) -> int | None:
    """Return the number of a version; None if the text is not one."""
    return int(text) if _NUMBER.fullmatch(text) else None


def split_reference(reference: str) -> tuple[str, int] | None:
    """Return the name and version in ``name@3``; None for anything else, such as a path."""
    name, _, number = reference.partition("@")
    version = parse_version(number)
    return (name, version) if is_model_name(name) and version is not None else None


def bare_name(reference: str) -> str:
    """Return ``name`` of ``name@3``; any other text unchanged."""
    found = split_reference(reference)
    return reference if found is None else found[0]


def is_path(name: str) -> bool:
    """Return whether a model's name is a path, by its letters; ``a/b`` is a name of the hub."""
    return name.startswith(("/", "~", ".")) or name.count("/") > 1 or "\\" in name


def shown_name(reference: str) -> str:
    """Return the name of a model for readers who do not know this machine.

    Of a path that is the hub's name of the model if the path is in the hub's cache, else its last
    folder.
    """
    if not is_path(reference):
        return reference
    if (cached := _IN_HUB_CACHE.search(reference)) is not None:
        return f"{cached[1]}/{cached[2]}"
    parts = [part for part in re.split(r"[/\\]", reference) if part.strip(".~")]
    return parts[-1] if parts else "model"
