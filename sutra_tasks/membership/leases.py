"""When a lease has ended: decisions over counters of heartbeats, without I/O.

A lease is a counter of one worker's heartbeats. It ends when a reaper has seen the counter stand still
for ``SUTRA_LEASE_S`` of uninterrupted observation, so a pause of the server or of the reaper ends no
lease. A worker whose counter starts anew learns from it that a reaper has ended its lease.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["POLL_S", "LeaseLossDetector", "LeaseObservations"]

POLL_S: Final = 1.0
"""Seconds between two observations of a reaper."""

INTERRUPTED_S: Final = 3 * POLL_S
"""An observation this long after the last one proves nothing about the time between."""


@dataclass(slots=True)
class LeaseLossDetector:
    """Detects that this process lost its lease: its counter on the server starts anew.

    ``is_lost`` stays True until the owner of this object has acted on it and sets it to False.
    """

    is_lost: bool = False
    _beats: int = 0

    def observe(self, beats: int) -> None:
        """Compare the server's count of this process's heartbeats with the last one."""
        # Not "is 1": if an answer is lost, the first count that arrives may be that of the second beat.
        self.is_lost = self.is_lost or beats <= self._beats
        self._beats = beats


@dataclass(frozen=True, slots=True)
class LeaseObservations:
    """What a reaper knows of all leases.

    Attributes:
        seen_at: monotonic seconds of the last observation.
        unchanged: by incarnation, its heartbeats and the time since which they have not changed.
    """

    seen_at: float = -float("inf")
    unchanged: Mapping[str, tuple[int, float]] = field(default_factory=dict)

    def after(self, beats: Mapping[str, int], now: float) -> LeaseObservations:
        """Return what is known after one more observation.

        Args:
            beats: heartbeats so far, by incarnation.
            now: monotonic seconds.
        """
        before = self.unchanged if now - self.seen_at <= INTERRUPTED_S else {}
        return LeaseObservations(
            now,
            {
                name: before[name] if name in before and before[name][0] == count else (count, now)
                for name, count in beats.items()
            },
        )

    def is_uninterrupted_since(self, before: LeaseObservations) -> bool:
        """Say whether this observation came soon enough after ``before``."""
        return self.seen_at - before.seen_at <= INTERRUPTED_S

    def ended(self, lease_s: float) -> list[str]:
        """Return the incarnations whose lease has ended."""
        return [name for name, (_, since) in self.unchanged.items() if self.seen_at - since >= lease_s]
