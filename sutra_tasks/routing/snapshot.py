"""The fleet as a balancing strategy sees it: values, made from the records and loads of devices."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from sutra_tasks import keys
from sutra_tasks.broker.load import MOST_CREDIT
from sutra_tasks.health.states import DeviceState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sutra_tasks.membership.fleet import FleetMember

__all__ = ["UNLIMITED", "Device", "Fleet", "fleet_of"]

UNLIMITED: Final = 2**63

PREFERRED_STATES: Final = (
    (DeviceState.HEALTHY, DeviceState.DEGRADED),
    (DeviceState.PROBING,),
    (DeviceState.UNHEALTHY,),
)


@dataclass(frozen=True, slots=True)
class Device:
    """A live device that takes work; tokens are estimated ones, as in ``Demand.tokens``."""

    id: str
    queue: str
    state: DeviceState = DeviceState.HEALTHY
    backlog_tokens: int = 0
    """Forwarded to it and not finished."""

    backlog_messages: int = 0
    credit_used: int = 0
    """Its backlog in tokens, where each message counts ``MOST_CREDIT`` at most."""

    credit_tokens: int = UNLIMITED
    """With so much credit used it gets no more messages while another device has credit."""

    tokens_per_s: float | None = None
    """Speed while it computes; None here and below: never measured."""

    latency_s: float | None = None
    """Mean time to compute one call."""

    latency_per_token_s: float | None = None
    models: tuple[str, ...] = ()
    """Models in its memory; it would have to load any other."""

    space: str = ""
    """Embedding space of its default model; empty: not known."""

    @property
    def has_credit(self) -> bool:
        """Whether it has credit for one more message."""
        return self.credit_used < self.credit_tokens


@dataclass(frozen=True, slots=True)
class Fleet:
    """A snapshot of the fleet.

    Attributes:
        devices: the live devices that take work, in order of their ids.
        known: how many devices are registered, dead ones included.
        oldest_heartbeat_s: age of the oldest heartbeat among them.
    """

    devices: tuple[Device, ...] = ()
    known: int = 0
    oldest_heartbeat_s: float | None = None

    @property
    def eligible(self) -> list[Device]:
        """The devices that may get messages: those in the best state that any device is in.

        Healthy and degraded ones; without any, probing ones; else unhealthy ones.
        """
        for states in PREFERRED_STATES:
            if found := [device for device in self.devices if device.state in states]:
                return found
        return []

    @property
    def has_credit(self) -> bool:
        """Whether an eligible device has credit; without one, messages wait."""
        return any(device.has_credit for device in self.eligible)

    def after_sending(self, device: Device, tokens: int) -> Fleet:
        """Return the snapshot with one more message for a device."""
        return self._with(device.id, 1, tokens)

    def after_finishing(self, device_id: str, tokens: int) -> Fleet:
        """Return the snapshot with one message less for a device."""
        return self._with(device_id, -1, tokens)

    def _with(self, device_id: str, sign: int, tokens: int) -> Fleet:
        credit = min(tokens, MOST_CREDIT)
        devices = [
            replace(
                one,
                backlog_tokens=max(0, one.backlog_tokens + sign * tokens),
                backlog_messages=max(0, one.backlog_messages + sign),
                credit_used=max(0, one.credit_used + sign * credit),
            )
            if one.id == device_id
            else one
            for one in self.devices
        ]
        return Fleet(tuple(devices), self.known, self.oldest_heartbeat_s)


def fleet_of(members: Sequence[FleetMember], ttl_s: float) -> Fleet:
    """Return the snapshot of a fleet.

    Args:
        members: every registered device.
        ttl_s: seconds since its last heartbeat for which a device is live.
    """
    return Fleet(
        devices=tuple(_device(one) for one in members if one.is_live(ttl_s) and one.takes_work),
        known=len(members),
        oldest_heartbeat_s=max((one.heartbeat_age_s for one in members), default=None),
    )


def _device(member: FleetMember) -> Device:
    record, queue = member.record, keys.device_queue(member.id)
    if record is None:  # of another version of this package: it takes work, and no more is known
        return Device(member.id, queue)
    return Device(
        member.id,
        queue,
        state=record.state,
        backlog_tokens=member.backlog_tokens,
        backlog_messages=member.backlog_messages,
        credit_used=member.credit_used,
        models=record.models,
        space=record.space,
        credit_tokens=record.credit_tokens,
        tokens_per_s=record.tokens_per_s,
        latency_s=record.latency_s,
        latency_per_token_s=record.latency_per_token_s,
    )
