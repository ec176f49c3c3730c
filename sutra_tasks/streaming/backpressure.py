"""Backpressure: how much a stream's producers have to slow down, by the specification's table.

Pure. The level follows from how full the stream is, how loaded the machines are, and the level before:
a level is left at lower thresholds than it is reached.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

__all__ = ["ACTIONS", "BackpressureAction", "Level", "next_level", "pause_s", "system_load"]

SEVERE_BUFFER: Final = 0.9
SEVERE_LOAD: Final = 0.8
MODERATE_BUFFER: Final = 0.7
MODERATE_LOAD: Final = 0.6
SLACK: Final = 0.1
"""How far a value must fall below its threshold to leave a level: otherwise a value that varies around
the threshold would make producers stop and go."""


class Level(IntEnum):
    """How much pressure there is."""

    NORMAL = 0
    MODERATE = 1
    SEVERE = 2


@dataclass(frozen=True, slots=True)
class BackpressureAction:
    """What a level asks for.

    Attributes:
        throttle_rate: share of its own unthrottled rate that a producer may offer.
        increase_batch_size: whether devices trade latency for throughput.
        shed_low_priority: whether entries of low priority are refused.
    """

    throttle_rate: float
    increase_batch_size: bool
    shed_low_priority: bool


ACTIONS: Final = {
    Level.NORMAL: BackpressureAction(1.0, increase_batch_size=False, shed_low_priority=False),
    Level.MODERATE: BackpressureAction(0.8, increase_batch_size=True, shed_low_priority=False),
    Level.SEVERE: BackpressureAction(0.5, increase_batch_size=True, shed_low_priority=True),
}
"""The specification's table."""


def system_load(*shares: float | None) -> float:
    """Return the load of a machine, 0 to 1, from the use of its resources.

    It is the mean in which each resource weighs as much as it is used, ``sum(l**2) / sum(l)``, so that
    the bottleneck weighs most; 0 if nothing is used.

    Args:
        *shares: use of each resource, 0 to 1; None if the machine does not have it.
    """
    present = [min(max(share, 0.0), 1.0) for share in shares if share is not None]
    total = sum(present)
    return sum(share * share for share in present) / total if total > 0 else 0.0


def next_level(buffer_use: float, load: float, before: Level) -> Level:
    """Return the level that follows ``before``.

    Args:
        buffer_use: entries that wait, over the capacity; over 1 if producers ignore backpressure.
        load: mean of the machines' :func:`system_load`.
        before: the level until now.
    """
    reached = _level(buffer_use, load, slack=0.0)
    # A level stays while the values exceed its lower thresholds.
    return max(reached, min(before, _level(buffer_use, load, slack=SLACK)))


def _level(buffer_use: float, load: float, *, slack: float) -> Level:
    if buffer_use > SEVERE_BUFFER - slack and load > SEVERE_LOAD - slack:
        return Level.SEVERE
    if buffer_use > MODERATE_BUFFER - slack or load > MODERATE_LOAD - slack:
        return Level.MODERATE
    return Level.NORMAL


def pause_s(own_s: float, throttle_rate: float) -> float:
    """Return how long a producer rests after its work, to offer ``throttle_rate`` of its own rate.

    Args:
        own_s: seconds that its work took, without rests and without sending: a throttle must not act on
            a rate that is throttled already.
        throttle_rate: as in :class:`BackpressureAction`.
    """
    return max(0.0, own_s) * (1.0 / throttle_rate - 1.0)
