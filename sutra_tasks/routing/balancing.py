"""Which device gets a message: pure functions over a snapshot of the fleet.

``choose`` selects the candidates, then a strategy chooses one of them. ``ticket`` is the number of the
message in its router; strategies derive turns and random draws from it, so they keep no state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Final

from sutra_tasks.client.call import check_strategy
from sutra_tasks.errors import NoHealthyWorkersError
from sutra_tasks.health.states import DeviceState

if TYPE_CHECKING:
    from sutra_tasks.client.call import Demand
    from sutra_tasks.routing.snapshot import Device, Fleet

__all__ = ["STRATEGIES", "Strategy", "assign", "choose"]

DEGRADED_COST_FACTOR: Final = 2
"""Factor on the cost of a degraded device."""

TRIAL: Final = 5
"""An idle device on trial gets one message where its fair share would be so many."""

TIE: Final = 0.05
"""Costs that exceed the least by less than this share tie: measurements are no more exact."""

_DEGRADED: Final = DeviceState.DEGRADED  # looking it up in the class takes longer than the comparison
_MASK: Final = 2**64 - 1


Strategy = Callable[[Sequence["Device"], "Demand", int, float], "Device"]
"""``(candidates, demand, ticket, queue_penalty_s) -> Device``; there is always a candidate."""


def round_robin(devices: Sequence[Device], demand: Demand, ticket: int, penalty_s: float) -> Device:  # noqa: ARG001 - a Strategy
    """Give each device the same number of messages in turn, a degraded one half as many."""
    turns = _turns(devices)
    return turns[ticket % len(turns)]


def random(devices: Sequence[Device], demand: Demand, ticket: int, penalty_s: float) -> Device:  # noqa: ARG001 - a Strategy
    """Draw a device, a degraded one half as often."""
    turns = _turns(devices)
    return turns[_draw(ticket) % len(turns)]


def least_loaded(devices: Sequence[Device], demand: Demand, ticket: int, penalty_s: float) -> Device:  # noqa: ARG001 - a Strategy
    """Choose the shortest queue, counted in messages with this one: the specification's rule."""
    return _least(devices, [device.backlog_messages + 1 for device in devices], ticket, tie=0)


def performance_based(
    devices: Sequence[Device], demand: Demand, ticket: int, penalty_s: float
) -> Device:
    """Choose the highest ``1 / (latency + queue * penalty)``: the specification's score.

    That is the least of the denominators, so nothing divides by zero. The latency is that of this
    message: from its tokens where the time per token was measured, else the device's mean.
    """
    tokens = demand.tokens
    latencies = _or_median([_latency_s(device, tokens) for device in devices], otherwise=0.0)
    costs = [
        latency + device.backlog_messages * penalty_s
        for device, latency in zip(devices, latencies, strict=True)
    ]
    return _least(devices, costs, ticket, tie=TIE)


def shortest_finish(devices: Sequence[Device], demand: Demand, ticket: int, penalty_s: float) -> Device:  # noqa: ARG001 - a Strategy
    """Choose the device that finishes first: ``(backlog + tokens of the message) / tokens per second``.

    In queueing theory "shortest expected delay", counted in tokens.
    """
    tokens = demand.tokens
    speeds = _or_median([device.tokens_per_s for device in devices], otherwise=1.0)
    costs = [
        (device.backlog_tokens + tokens) / speed for device, speed in zip(devices, speeds, strict=True)
    ]
    return _least(devices, costs, ticket, tie=TIE)


STRATEGIES: Final[Mapping[str, Strategy]] = {
    "shortest_finish": shortest_finish,
    "least_loaded": least_loaded,
    "performance_based": performance_based,
    "random": random,
    "round_robin": round_robin,
}


def choose(fleet: Fleet, demand: Demand, ticket: int, *, default: str, queue_penalty_s: float) -> Device:
    """Choose a device by the strategy that the demand names, else by ``default``.

    Raises:
        NoHealthyWorkersError: no device is live.
        InvalidOptionError: the demand names an unknown strategy.
    """
    name = check_strategy(demand.strategy or default)
    eligible = fleet.eligible
    if not eligible:
        raise NoHealthyWorkersError(fleet.known, fleet.oldest_heartbeat_s, 0.0)
    on_trial = _trial(fleet, name, _draw(ticket) >> 32)  # not the bits that the strategy "random" uses
    if on_trial is not None and demand.model in (None, *on_trial.models):
        return on_trial
    candidates = [device for device in eligible if device.has_credit] or eligible
    if demand.model is not None:
        # A device that would have to load the model gets it only when those that have it are busy.
        candidates = [device for device in candidates if demand.model in device.models] or candidates
    return STRATEGIES[name](candidates, demand, ticket, queue_penalty_s)


def assign(
    fleet: Fleet, demands: Sequence[Demand], ticket: int, *, default: str, queue_penalty_s: float
) -> list[Device | None]:
    """Choose devices for messages that are sent together; None where no device has credit left.

    Raises:
        InvalidOptionError: a demand names an unknown strategy.
    """
    chosen: list[Device | None] = []
    for number, demand in enumerate(demands):
        if not fleet.has_credit:
            chosen.append(None)
            continue
        device = choose(fleet, demand, ticket + number, default=default, queue_penalty_s=queue_penalty_s)
        chosen.append(device)
        fleet = fleet.after_sending(device, demand.tokens)
    return chosen


def _trial(fleet: Fleet, name: str, draw: int) -> Device | None:
    """Return an idle device on trial, if this message is one for it.

    On trial are probing devices, degraded ones, which would get nothing by cost alone, and healthy ones
    without the measurement that the strategy uses. Each gets a ``TRIAL``-th of its fair share, whatever
    the size of the fleet.
    """
    slot = draw % (TRIAL * len(fleet.devices))
    if slot >= len(fleet.devices):
        return None
    device = fleet.devices[slot]
    if device.backlog_messages or not device.has_credit:
        return None
    measure = _MEASURES.get(name)
    on_trial = device.state in (DeviceState.PROBING, DeviceState.DEGRADED) or (
        device.state is DeviceState.HEALTHY and measure is not None and not _is_known(measure(device))
    )
    return device if on_trial else None


def _turns(devices: Sequence[Device]) -> list[Device]:
    """Return each device once, and again if it is not degraded, so that it gets two turns."""
    return [*devices, *(device for device in devices if device.state is not _DEGRADED)]


def _least(devices: Sequence[Device], costs: Sequence[float], ticket: int, *, tie: float) -> Device:
    """Return a device of the least cost; the cost of a degraded one counts double.

    Devices that tie take turns: otherwise the first would get the messages of every router.
    """
    weighted = [
        cost * DEGRADED_COST_FACTOR if device.state is _DEGRADED else cost
        for device, cost in zip(devices, costs, strict=True)
    ]
    limit = min(weighted) * (1 + tie)
    near = [device for device, cost in zip(devices, weighted, strict=True) if cost <= limit]
    return near[ticket % len(near)]


def _latency_s(device: Device, tokens: int) -> float | None:
    per_token_s = device.latency_per_token_s
    return device.latency_s if per_token_s is None else per_token_s * tokens


_MEASURES: Final[Mapping[str, Callable[[Device], float | None]]] = {
    "performance_based": lambda device: _latency_s(device, 1),
    "shortest_finish": lambda device: device.tokens_per_s,
}


def _is_known(measured: float | None) -> bool:
    return measured is not None and measured > 0  # false for NaN, too


def _or_median(measured: Sequence[float | None], *, otherwise: float) -> list[float]:
    """Return the measurements, with their median where one is missing; ``otherwise`` if all are."""
    known = [value for value in measured if value is not None and value > 0]
    if len(known) == len(measured):
        return known
    middle = median(known) if known else otherwise
    return [value if value is not None and value > 0 else middle for value in measured]


def _draw(ticket: int) -> int:
    """Return 64 bits that look random: the finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    z = (ticket * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
