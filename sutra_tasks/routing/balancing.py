"""Which device gets a message: pure functions over a snapshot of the fleet.

``choose`` finds who may get work at all, then asks a strategy. ``ticket`` counts the messages one
router has routed; whoever needs a turn or a draw takes it from there and keeps no state of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Final

from sutra_tasks.broker.queues import MOST_CREDIT
from sutra_tasks.client.call import check_strategy
from sutra_tasks.errors import NoHealthyWorkersError
from sutra_tasks.health.states import State

if TYPE_CHECKING:
    from sutra_tasks.client.call import Demand

__all__ = ["STRATEGIES", "UNLIMITED", "Device", "Fleet", "Strategy", "assign", "choose"]

UNLIMITED: Final = 2**63
DEGRADED_COSTS: Final = 2
"""What a degraded device is taken to cost, against the same device healthy."""

TRIAL: Final = 5
"""An idle device of which too little is known gets one message where a fair share would be so many."""

TIE: Final = 0.05
"""Costs this close to the least, relatively, are too roughly measured to tell apart."""

_PREFERRED: Final = ((State.HEALTHY, State.DEGRADED), (State.PROBING,), (State.UNHEALTHY,))
_DEGRADED: Final = State.DEGRADED  # looking it up in its class costs more than the comparison
_MASK: Final = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Device:
    """A live device as the router sees it; tokens are those of ``Demand.tokens``."""

    id: str
    queue: str
    state: State = State.HEALTHY
    backlog_tokens: int = 0
    """Dispatched and not completed."""

    backlog_messages: int = 0
    credit_used: int = 0
    """Its backlog in tokens, where each message counts ``MOST_CREDIT`` at most."""

    credit_tokens: int = UNLIMITED
    """With so much credit used it gets no more, while others have room."""

    tokens_per_s: float | None = None
    """While busy; None: never measured, as below."""

    latency_s: float | None = None
    """Usual time to compute one request."""

    latency_per_token_s: float | None = None
    models: tuple[str, ...] = ()
    """What it has in memory; any other it would load first."""

    space: str = ""
    """Of the vectors it gives by default, if it says so."""

    @property
    def has_credit(self) -> bool:
        """Whether it may get more work."""
        return self.credit_used < self.credit_tokens


@dataclass(frozen=True, slots=True)
class Fleet:
    """A snapshot: the live devices in order of their ids, and what is known of the others."""

    devices: tuple[Device, ...] = ()
    known: int = 0
    oldest_heartbeat_s: float | None = None

    @property
    def standing(self) -> list[Device]:
        """The devices that carry the load: never none for a reason of health alone.

        Healthy and degraded ones; if there are none, those that are probed; else the unhealthy.
        """
        for states in _PREFERRED:
            if found := [device for device in self.devices if device.state in states]:
                return found
        return []

    @property
    def has_credit(self) -> bool:
        """Whether ``choose`` has a device that may get more work; without one, work waits."""
        return any(device.has_credit for device in self.standing)

    def sent(self, device: Device, tokens: int) -> Fleet:
        """Return the snapshot as it is after one more message to ``device``."""
        for at, one in enumerate(self.devices):
            if one.id == device.id:
                loaded = replace(
                    one,
                    backlog_tokens=one.backlog_tokens + tokens,
                    backlog_messages=one.backlog_messages + 1,
                    credit_used=one.credit_used + min(tokens, MOST_CREDIT),
                )
                return replace(self, devices=(*self.devices[:at], loaded, *self.devices[at + 1 :]))
        return self

    def done(self, device_id: str, tokens: int) -> Fleet:
        """Return the snapshot as it is after a device has finished a message."""
        return replace(
            self,
            devices=tuple(
                one
                if one.id != device_id
                else replace(
                    one,
                    backlog_tokens=max(0, one.backlog_tokens - tokens),
                    backlog_messages=max(0, one.backlog_messages - 1),
                    credit_used=max(0, one.credit_used - min(tokens, MOST_CREDIT)),
                )
                for one in self.devices
            ),
        )


Strategy = Callable[[Sequence[Device], "Demand", int, float], Device]
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

    That is the least of what it divides by, so nothing divides by zero. The latency is this
    request's: by its tokens where that was measured, else the device's usual one.
    """
    tokens = demand.tokens
    latencies = _or_median([_latency_s(device, tokens) for device in devices], otherwise=0.0)
    costs = [
        latency + device.backlog_messages * penalty_s
        for device, latency in zip(devices, latencies, strict=True)
    ]
    return _least(devices, costs, ticket, tie=TIE)


def shortest_finish(devices: Sequence[Device], demand: Demand, ticket: int, penalty_s: float) -> Device:  # noqa: ARG001 - a Strategy
    """Choose where this message is done first: ``(backlog + its tokens) / tokens per second``.

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
    """Choose a device by the demand's own strategy, else by ``default``.

    Raises:
        NoHealthyWorkersError: no device lives.
        InvalidOptionError: the demand names an unknown strategy.
    """
    name = check_strategy(demand.strategy or default)
    standing = fleet.standing
    if not standing:
        raise NoHealthyWorkersError(fleet.known, fleet.oldest_heartbeat_s, 0.0)
    tried = _trial(fleet, name, _draw(ticket) >> 32)  # other bits than the strategy "random" looks at
    if tried is not None and demand.model in (None, *tried.models):
        return tried
    candidates = [device for device in standing if device.has_credit] or standing
    if demand.model is not None:
        # One that would have to load the model is asked only when those that have it are busy.
        candidates = [device for device in candidates if demand.model in device.models] or candidates
    return STRATEGIES[name](candidates, demand, ticket, queue_penalty_s)


def assign(
    fleet: Fleet, demands: Sequence[Demand], ticket: int, *, default: str, queue_penalty_s: float
) -> list[Device | None]:
    """Choose devices for what is sent together; None where no device has credit left.

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
        fleet = fleet.sent(device, demand.tokens)
    return chosen


def _trial(fleet: Fleet, name: str, draw: int) -> Device | None:
    """Return an idle device of which too little is known, if this message falls to one.

    That is a probed one, a degraded one, which costs alone may starve, and one whose speed the strategy
    goes by and nobody measured. Each gets a ``TRIAL``-th of a fair share, whatever the fleet's size.
    """
    slot = draw % (TRIAL * len(fleet.devices))
    if slot >= len(fleet.devices):
        return None
    device = fleet.devices[slot]
    if device.backlog_messages or not device.has_credit:
        return None
    measure = _MEASURES.get(name)
    unsure = device.state in (State.PROBING, State.DEGRADED) or (
        device.state is State.HEALTHY and measure is not None and not _is_known(measure(device))
    )
    return device if unsure else None


def _turns(devices: Sequence[Device]) -> list[Device]:
    """Return the devices with a place each, and another one for those that take a full share."""
    return [*devices, *(device for device in devices if device.state is not _DEGRADED)]


def _least(devices: Sequence[Device], costs: Sequence[float], ticket: int, *, tie: float) -> Device:
    """Return a device of the least cost, which counts double on a degraded one.

    Those that tie take turns: always the first would get the messages of every router.
    """
    felt = [
        cost * DEGRADED_COSTS if device.state is _DEGRADED else cost
        for device, cost in zip(devices, costs, strict=True)
    ]
    limit = min(felt) * (1 + tie)
    near = [device for device, cost in zip(devices, felt, strict=True) if cost <= limit]
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
