"""Which device gets a message: pure functions over a snapshot of the fleet.

A strategy is ``(fleet, demand, ticket) -> Device``. ``ticket`` counts the messages this router has
routed; a strategy that needs a turn or a draw takes it from there and keeps no state of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sutra_tasks.calls import check_strategy
from sutra_tasks.errors import NoHealthyWorkersError

if TYPE_CHECKING:
    from sutra_tasks.calls import Demand

__all__ = ["STRATEGIES", "Device", "Fleet", "choose", "round_robin"]


@dataclass(frozen=True, slots=True)
class Device:
    """A live device as the router sees it."""

    id: str
    queue: str


@dataclass(frozen=True, slots=True)
class Fleet:
    """A snapshot: the live devices in order of their ids, and what is known of the others."""

    devices: tuple[Device, ...] = ()
    known: int = 0
    oldest_heartbeat_s: float | None = None


Strategy = Callable[[Fleet, "Demand", int], Device]


def round_robin(fleet: Fleet, demand: Demand, ticket: int) -> Device:  # noqa: ARG001 - a Strategy
    """Give each live device the same number of messages, in turn."""
    return fleet.devices[ticket % len(fleet.devices)]


STRATEGIES: Final[Mapping[str, Strategy]] = {"round_robin": round_robin}


def choose(fleet: Fleet, demand: Demand, ticket: int, *, default: str) -> Device:
    """Choose a device by the demand's own strategy, else by ``default``.

    Raises:
        NoHealthyWorkersError: no device lives.
        InvalidOptionError: the demand names an unknown strategy.
    """
    strategy = STRATEGIES[check_strategy(demand.strategy or default)]
    if not fleet.devices:
        raise NoHealthyWorkersError(fleet.known, fleet.oldest_heartbeat_s, 0.0)
    return strategy(fleet, demand, ticket)
