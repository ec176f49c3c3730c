"""The Redis lists behind Celery's queues, and the names of the processes that take from them."""

from __future__ import annotations

import secrets
from bisect import bisect_right
from functools import cache
from typing import TYPE_CHECKING, Final

from kombu.transport.redis import PRIORITY_STEPS
from kombu.transport.redis import Channel as StockChannel

from sutra_tasks import keys

if TYPE_CHECKING:
    from collections.abc import Sequence

    import redis

__all__ = [
    "MOST_CREDIT",
    "NO_DEVICE",
    "device_of",
    "home",
    "lane",
    "lanes",
    "new_incarnation",
    "queue_lengths",
]

MOST_CREDIT: Final = 1024
"""Tokens of credit one message uses at most: a list of 10,000 texts must not keep a single one out."""

NO_DEVICE: Final = "~"
"""In names of incarnations; no device can be called so."""


def new_incarnation(device_id: str | None) -> str:
    """Name one start of the worker of a device, or of a worker that is none."""
    return f"{device_id or NO_DEVICE}.{secrets.token_hex(4)}"


def device_of(incarnation: str) -> str | None:
    """Return the device whose worker ``incarnation`` names, None if that is a router."""
    name = incarnation.rpartition(".")[0]
    return None if name == NO_DEVICE else name


@cache
def lanes(queue: str) -> tuple[str, ...]:
    """Return all lists of ``queue``, the first served first."""
    return tuple(f"{queue}{StockChannel.sep}{step}" if step else queue for step in PRIORITY_STEPS)


def lane(queue: str, priority: int) -> str:
    """Return the Redis list of ``queue`` that holds messages of ``priority`` (0 goes first)."""
    return lanes(queue)[bisect_right(PRIORITY_STEPS, max(0, min(priority, 9))) - 1]


def home(queue: str) -> str:
    """Return where a message taken from ``queue`` goes back to: a device's are routed afresh."""
    return keys.EMBED_QUEUE if queue.startswith(keys.DEVICE_QUEUE_PREFIX) else queue


def queue_lengths(client: redis.Redis, queues: Sequence[str]) -> dict[str, int]:
    """Return how many messages wait in each queue, over all its priorities, in one round trip."""
    with client.pipeline(transaction=False) as pipe:
        for queue in queues:
            for one in lanes(queue):
                pipe.llen(one)
        lengths = iter(pipe.execute())
    return {queue: sum(next(lengths) for _ in lanes(queue)) for queue in queues}
