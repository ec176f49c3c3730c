"""When a stream's producers are to slow down: the specification's table, with hysteresis downwards.

Pure: a level follows from how full the buffer is, how loaded the machine is, and the level before.
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
"""A level is left only when what brought it about has fallen so far below its threshold: a signal that
flaps at the edge would have producers stop and go."""


class Level(IntEnum):
    """How much pressure there is."""

    NORMAL = 0
    MODERATE = 1
    SEVERE = 2


@dataclass(frozen=True, slots=True)
class BackpressureAction:
    """What to do about it.

    Attributes:
        throttle_rate: share of its own unthrottled rate that a producer may offer; never compounded.
        increase_batch_size: trade latency for throughput.
        shed_low_priority: refuse what can wait, and tell its producer.
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
    """Return the load of a machine from the use of its resources, each 0 to 1; None: not present.

    The weighted mean in which each resource weighs as much as it is used, ``sum(l**2) / sum(l)``: the
    bottleneck weighs most. 0 when nothing is used.
    """
    present = [min(max(share, 0.0), 1.0) for share in shares if share is not None]
    total = sum(present)
    return sum(share * share for share in present) / total if total > 0 else 0.0


def next_level(buffer_use: float, load: float, before: Level) -> Level:
    """Return the level that follows ``before``.

    Args:
        buffer_use: entries over capacity; over 1 where a producer ignored the signal.
        load: as :func:`system_load` gives it.
        before: the level until now.
    """
    reached = _level(buffer_use, load, slack=0.0)
    # On the way down the thresholds are lower: what still exceeds those stays.
    return max(reached, min(before, _level(buffer_use, load, slack=SLACK)))


def _level(buffer_use: float, load: float, *, slack: float) -> Level:
    if buffer_use > SEVERE_BUFFER - slack and load > SEVERE_LOAD - slack:
        return Level.SEVERE
    if buffer_use > MODERATE_BUFFER - slack or load > MODERATE_LOAD - slack:
        return Level.MODERATE
    return Level.NORMAL


def pause_s(own_s: float, throttle_rate: float) -> float:
    """Return how long a producer rests after work of its own, to offer ``throttle_rate`` of its rate.

    Args:
        own_s: seconds it took to come up with what it sent; no rests and no sending among them, so that
            a throttle never acts on a rate that is throttled already.
        throttle_rate: as :class:`BackpressureAction` says.
    """
    return max(0.0, own_s) * (1.0 / throttle_rate - 1.0)
