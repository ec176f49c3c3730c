"""The Redis lists behind Celery's queues, and the names of the processes that take from them."""

from __future__ import annotations

import secrets
from bisect import bisect_right
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from kombu.transport.redis import PRIORITY_STEPS
from kombu.transport.redis import Channel as StockChannel

from sutra_tasks import keys

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import redis

__all__ = [
    "NO_DEVICE",
    "device_of",
    "lane",
    "lanes",
    "new_incarnation",
    "priority_of",
    "queue_lengths",
    "queue_of",
    "requeue_target",
]

NO_DEVICE: Final = "~"
"""Stands for the device in names of incarnations that have none; no device can be called so."""


def new_incarnation(device_id: str | None) -> str:
    """Return a name for one start of a worker: of a device's, or of one without a device."""
    return f"{device_id or NO_DEVICE}.{secrets.token_hex(4)}"


def device_of(incarnation: str) -> str | None:
    """Return the device whose worker ``incarnation`` names, None if it has no device."""
    name = incarnation.rpartition(".")[0]
    return None if name == NO_DEVICE else name


@cache
def lanes(queue: str) -> tuple[str, ...]:
    """Return the Redis lists of ``queue``, one for each priority of kombu's, the first served first."""
    name = keys.named(queue)
    return tuple(f"{name}{StockChannel.sep}{step}" if step else name for step in PRIORITY_STEPS)


def lane(queue: str, priority: int) -> str:
    """Return the Redis list of ``queue`` that has messages of ``priority`` (0 goes first)."""
    return lanes(queue)[bisect_right(PRIORITY_STEPS, max(0, min(priority, 9))) - 1]


def priority_of(properties: Mapping[str, Any]) -> int:
    """Return the priority that a message's properties name; 0, which goes first, for anything odd."""
    priority = properties.get("priority")
    return priority if type(priority) is int else 0


def queue_of(lane_name: str) -> str:
    """Return the queue that a Redis list belongs to."""
    return lane_name.removeprefix(keys.prefix()).partition(StockChannel.sep)[0]


def requeue_target(queue: str) -> str:
    """Return the queue that a message taken from ``queue`` is requeued to.

    A message of a device goes to the router's queue, because another device may be better by now.
    """
    return keys.EMBED_QUEUE if queue.startswith(keys.DEVICE_QUEUE_PREFIX) else queue


def queue_lengths(client: redis.Redis, queues: Sequence[str]) -> dict[str, int]:
    """Return how many messages wait in each queue, over all its priorities, in one round trip."""
    with client.pipeline(transaction=False) as pipe:
        for queue in queues:
            for one in lanes(queue):
                pipe.llen(one)
        lengths = iter(pipe.execute())
    return {queue: sum(next(lengths) for _ in lanes(queue)) for queue in queues}
