r"""Every queue name and Redis key, with its type and lifetime.

==============================  ======  =====================================================
key                             type    lifetime
==============================  ======  =====================================================
``sutra.embed``                 list    a Celery queue: what waits for the router
``sutra.device.<id>``           list    a Celery queue: what waits for one device
``sutra:held:<incarnation>``    list    messages one worker process has taken and not finished;
                                        gone when empty, never expires (it is work)
``sutra:worker:<name>``         string  the newest incarnation of a worker, :data:`REMEMBER_S`
``sutra:fleet``                 zset    device id -> time of its last heartbeat (server clock);
                                        members leave on drain, :data:`FORGET_AFTER_S` later at most
``sutra:device:<id>``           string  JSON record of one device, :data:`FORGET_AFTER_S`
``sutra:router:<name>``         string  JSON record of one router, ``SUTRA_DEVICE_TTL_S``
``celery-task-meta-<task>``     string  Celery's own: a result, ``SUTRA_RESULT_TTL_S``
==============================  ======  =====================================================

kombu appends ``\x06\x16<priority>`` to a queue's name for its lanes 3, 6 and 9.
"""

from __future__ import annotations

from typing import Final

__all__ = [
    "DEVICE_QUEUE_PREFIX",
    "EMBED_QUEUE",
    "EMBED_TASK",
    "FLEET",
    "FORGET_AFTER_S",
    "OWN_TASK_PREFIX",
    "REMEMBER_S",
    "device",
    "device_queue",
    "held",
    "router",
    "worker",
]

OWN_TASK_PREFIX: Final = "sutra."
EMBED_TASK: Final = "sutra.embed"
EMBED_QUEUE: Final = "sutra.embed"
DEVICE_QUEUE_PREFIX: Final = "sutra.device."

FLEET: Final = "sutra:fleet"

FORGET_AFTER_S: Final = 3600
"""Seconds a dead device stays visible in ``sutra status`` before its record goes."""


REMEMBER_S: Final = 30 * 24 * 3600
"""Seconds within which a worker that starts again returns what its predecessor held."""


def device_queue(device_id: str) -> str:
    """Celery queue of one device."""
    return DEVICE_QUEUE_PREFIX + device_id


def held(incarnation: str) -> str:
    """List of what one worker process has taken and not finished."""
    return f"sutra:held:{incarnation}"


def worker(name: str) -> str:
    """Newest incarnation of the worker of this name."""
    return f"sutra:worker:{name}"


def device(device_id: str) -> str:
    """Record of one device."""
    return f"sutra:device:{device_id}"


def router(name: str) -> str:
    """Record of one router."""
    return f"sutra:router:{name}"
