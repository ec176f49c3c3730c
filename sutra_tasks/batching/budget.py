"""How large batches may be over time: smaller after the device ran out of memory, then growing again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from sutra_tasks.batching.next_batch import Limits

__all__ = ["REGROWTH_S", "TokenBudget"]

REGROWTH_S: Final = 60.0
"""After this time the budget of a device that ran out of memory is doubled."""


@dataclass(frozen=True, slots=True)
class TokenBudget:
    """The limits of a device over time; the configured ones until it runs out of memory."""

    limits: Limits
    lowered_to: int | None = None
    lowered_at_s: float = 0.0

    def at(self, now_s: float) -> Limits:
        """Return the limits that hold at ``now_s``; they never exceed those configured."""
        if self.lowered_to is None:
            return self.limits
        doublings = min(64, int((now_s - self.lowered_at_s) / REGROWTH_S))  # 64 reach any limit
        return replace(self.limits, max_tokens=min(self.lowered_to << doublings, self.limits.max_tokens))

    def out_of_memory(self, padded_tokens: int, now_s: float) -> TokenBudget:
        """Return the budget after several texts of ``padded_tokens`` together did not fit.

        Half of it: two texts or more were padded to the longest, so that one still fits.
        """
        lowered_to = min(self.at(now_s).max_tokens, max(1, padded_tokens // 2))
        return TokenBudget(self.limits, lowered_to, now_s)
