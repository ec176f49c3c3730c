"""The fleet as a strategy sees it, made from what the devices last said of themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sutra_tasks import keys
from sutra_tasks.membership.devices import serves
from sutra_tasks.routing.balancing import Device, Fleet

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sutra_tasks.membership.devices import Sighting

__all__ = ["fleet_of"]


def fleet_of(seen: Sequence[Sighting], ttl_s: float) -> Fleet:
    """Reduce what was seen to what a strategy needs: the live devices that serve."""
    return Fleet(
        devices=tuple(_device(one) for one in seen if one.heartbeat_age_s <= ttl_s and serves(one)),
        known=len(seen),
        oldest_heartbeat_s=max((one.heartbeat_age_s for one in seen), default=None),
    )


def _device(seen: Sighting) -> Device:
    record, queue = seen.record, keys.device_queue(seen.id)
    if record is None:  # of another version: it serves, and that is all one knows
        return Device(seen.id, queue)
    return Device(
        seen.id,
        queue,
        state=record.state,
        backlog_tokens=seen.backlog_tokens,
        backlog_messages=seen.backlog_messages,
        credit_used=seen.credit_used,
        models=record.models,
        space=record.space,
        credit_tokens=record.credit_tokens,
        tokens_per_s=record.tokens_per_s,
        latency_s=record.latency_s,
        latency_per_token_s=record.latency_per_token_s,
    )
