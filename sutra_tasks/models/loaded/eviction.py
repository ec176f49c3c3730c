"""Which models leave so that another fits into the memory that they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from sutra_tasks.errors import ModelError

__all__ = ["CachedModel", "leaving", "models_to_evict"]

MB: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class CachedModel:
    """A model in memory.

    Attributes:
        reference: its name.
        size_bytes: what it takes up.
        used_at: when it was last used.
        stays: whether it must stay.
        is_candidate: whether it stays while a promotion lasts; no call fails for want of its room.
    """

    reference: str
    size_bytes: int
    used_at: float
    stays: bool = False
    is_candidate: bool = False


def leaving(held: Sequence[CachedModel], room_bytes: int) -> list[str]:
    """Return which models leave, the least recently used first, so that the others fit.

    Args:
        held: those that may leave.
        room_bytes: what they may take up together.
    """
    total, gone = sum(one.size_bytes for one in held), []
    for one in sorted(held, key=lambda one: one.used_at):
        if total <= room_bytes:
            break
        gone.append(one.reference)
        total -= one.size_bytes
    return gone


def models_to_evict(
    reference: str, size_bytes: int, held: Sequence[CachedModel], limit_mb: int, *, at_any_price: bool
) -> list[str]:
    """Return which models leave so that another fits.

    Args:
        reference: the other.
        size_bytes: what it takes up.
        held: the models in memory.
        limit_mb: ``SUTRA_MODEL_MEMORY_MB``.
        at_any_price: it comes though it does not fit beside those that stay.

    Raises:
        ModelError: it does not.
    """
    fixed = sum(one.size_bytes for one in held if one.stays)
    room = limit_mb * MB - fixed - size_bytes
    if room < 0 and not at_any_price:
        raise ModelError(
            reference,
            f"takes {size_bytes / MB:,.0f} MB beside {fixed / MB:,.0f} MB of models that stay, and "
            f"SUTRA_MODEL_MEMORY_MB is {limit_mb:,}",
        )
    room -= sum(one.size_bytes for one in held if one.is_candidate and not one.stays)
    return leaving([one for one in held if not (one.stays or one.is_candidate)], room)
