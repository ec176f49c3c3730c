"""Whether a message is forwarded, waits or fails: a function of the message, the fleet and the time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sutra_tasks.broker.load import MOST_CREDIT
from sutra_tasks.client.call import check_strategy
from sutra_tasks.errors import NoHealthyWorkersError
from sutra_tasks.routing.balancing import choose

if TYPE_CHECKING:
    from sutra_tasks.client.call import Demand
    from sutra_tasks.routing.snapshot import Device, Fleet
    from sutra_tasks.settings import Settings

__all__ = ["decide", "waited_s"]


def waited_s(demand: Demand, *, seen_at: float, now: float) -> float:
    """Return how long a message has been waiting for a device.

    Counted from when it was sent, so that a message does not wait again for each message before it in
    the queue. A sender's clock that is ahead only makes it wait longer.
    """
    sent_at = seen_at if demand.sent_at is None else min(demand.sent_at, seen_at)
    return max(0.0, now - sent_at)


def decide(
    demand: Demand,
    fleet: Fleet,
    *,
    ticket: int,
    seen_at: float,
    now: float,
    outage_s: float,
    has_waited: bool,
    options: Settings,
) -> Device | None:
    """Choose the device to which a message is forwarded.

    Args:
        demand: of the message.
        fleet: the devices.
        ticket: number of the message in its router.
        seen_at: when this router took the message, in Unix seconds.
        now: Unix seconds.
        outage_s: how long this router has seen no live device.
        has_waited: whether the message was decided on before, and had to wait.
        options: with the strategy, and how long a message waits for a device.

    Returns:
        The device; None if the message waits.

    Raises:
        InvalidOptionError: the message names an unknown strategy.
        NoHealthyWorkersError: it has waited long enough without a live device.
    """
    check_strategy(demand.strategy or options.strategy)
    if not fleet.devices:
        waiting_s = waited_s(demand, seen_at=seen_at, now=now)
        # A message sent long ago waits as long as any other once the outage has begun.
        if min(outage_s, waiting_s) >= options.no_device_wait_s:
            raise NoHealthyWorkersError(fleet.known, fleet.oldest_heartbeat_s, round(waiting_s, 1))
        return None
    # A router takes several messages at once, and after an outage many wait: without credit, large ones
    # and those that have waited would pile up before one device.
    if (has_waited or demand.tokens > MOST_CREDIT) and not fleet.has_credit:
        return None
    return choose(
        fleet,
        demand,
        ticket,
        default=options.strategy,
        queue_penalty_s=options.queue_penalty_factor,
    )
