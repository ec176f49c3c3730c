"""How many workers died with a message, as its headers say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

__all__ = ["ATTEMPTS", "DEATHS_NEARBY", "SUSPECT_AFTER", "attempts_of", "count_death"]

ATTEMPTS: Final = "sutra_attempts"
"""A message's header: how many workers died with it."""

DEATHS_NEARBY: Final = "sutra_near"
"""A message's header: how many workers died that had it among others, since its last attempt."""

SUSPECT_AFTER: Final = 2
"""Attempts after which a message is suspect: it runs alone, so that the next death is blamed on nobody
else, and counts only for the message that did run."""

DEATHS_NEARBY_PER_ATTEMPT: Final = 8
"""So many deaths nearby are one attempt of a suspect, which may end workers before it runs alone."""


def attempts_of(headers: Mapping[str, Any] | None) -> int:
    """Return how many workers died with a message, as far as is known."""
    return _count(headers, ATTEMPTS)


def count_death(headers: dict[str, Any], *, alone: bool) -> None:
    """Change a message's headers after its worker died.

    Args:
        headers: of the message.
        alone: the worker ran this message alone when it died; False: it ran several.
    """
    attempts = attempts_of(headers)
    nearby = 0 if alone or attempts < SUSPECT_AFTER else _count(headers, DEATHS_NEARBY) + 1
    if nearby in (0, DEATHS_NEARBY_PER_ATTEMPT):
        headers[ATTEMPTS] = attempts + 1
        headers.pop(DEATHS_NEARBY, None)
    else:
        headers[DEATHS_NEARBY] = nearby


def _count(headers: Mapping[str, Any] | None, name: str) -> int:
    found = (headers or {}).get(name)
    return found if type(found) is int and found > 0 else 0
