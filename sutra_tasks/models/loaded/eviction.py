"""Decides which models leave a device's memory so that another model fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from sutra_tasks.errors import ModelError

__all__ = ["CachedModel", "least_recently_used", "models_to_evict", "superseded_models"]

MB: Final = 1_000_000
SUPERSEDED_S: Final = 60.0
"""Seconds for which a version that no longer serves stays for long texts that were begun with it."""


@dataclass(frozen=True, slots=True)
class CachedModel:
    """A model in memory, as the decision needs it.

    Attributes:
        reference: its name; of the registry with its version.
        size_bytes: size of its weights.
        used_at: when it was last used, in seconds.
        stays: whether it must not be evicted.
        is_candidate: whether a promotion waits for it: it must not be evicted either, but its size never
            makes a call fail.
    """

    reference: str
    size_bytes: int
    used_at: float
    stays: bool = False
    is_candidate: bool = False


def models_to_evict(
    reference: str,
    size_bytes: int,
    cached: Sequence[CachedModel],
    limit_mb: int,
    *,
    may_exceed_limit: bool,
) -> list[str]:
    """Return the models to evict, the least recently used first.

    Args:
        reference: the model that needs the memory.
        size_bytes: size of its weights.
        cached: the other models in memory.
        limit_mb: ``SUTRA_MODEL_MEMORY_MB``.
        may_exceed_limit: load it even if it does not fit beside the models that stay.

    Raises:
        ModelError: it does not fit beside the models that stay.
    """
    staying_bytes = sum(one.size_bytes for one in cached if one.stays)
    free_bytes = limit_mb * MB - staying_bytes - size_bytes
    if free_bytes < 0 and not may_exceed_limit:
        raise ModelError(
            reference,
            f"takes {size_bytes / MB:,.0f} MB beside {staying_bytes / MB:,.0f} MB of models that stay, "
            f"and SUTRA_MODEL_MEMORY_MB is {limit_mb:,}",
        )
    free_bytes -= sum(one.size_bytes for one in cached if one.is_candidate and not one.stays)
    evictable = [one for one in cached if not (one.stays or one.is_candidate)]
    return least_recently_used(evictable, free_bytes)


def least_recently_used(cached: Sequence[CachedModel], free_bytes: int) -> list[str]:
    """Return the models to evict so that the others take up at most ``free_bytes``."""
    total_bytes, evicted = sum(one.size_bytes for one in cached), []
    for one in sorted(cached, key=lambda one: one.used_at):
        if total_bytes <= free_bytes:
            break
        evicted.append(one.reference)
        total_bytes -= one.size_bytes
    return evicted


def superseded_models(versions: Sequence[CachedModel], now: float) -> list[str]:
    """Return the versions that no call has used for :data:`SUPERSEDED_S`, except those that stay.

    Args:
        versions: the versions of registry models in memory; ``stays`` where one serves.
        now: by the clock of ``used_at``.
    """
    return [
        one.reference
        for one in versions
        if not (one.stays or one.is_candidate) and now - one.used_at > SUPERSEDED_S
    ]
