"""Routing in the client, for those who want to save the hop through the router.

    from sutra_tasks import app
    app.conf.task_routes = ["sutra_tasks.routing.direct.route"]

Calls then go straight to the queue of a device, chosen by the same functions over the same snapshot.
What that costs: each client process reads the snapshot itself, ten times a second as it sends; clients
see each other's work only once a device has taken it; and priorities apply in the device's queue only.
Without a device that has room, a call takes the ordinary way, and waits in the router's queue.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Final

import redis

from sutra_tasks import keys
from sutra_tasks.client.call import HEADER, demand_of
from sutra_tasks.connections import broker_client
from sutra_tasks.errors import SutraError
from sutra_tasks.membership.devices import sightings
from sutra_tasks.routing.balancing import Fleet, choose
from sutra_tasks.routing.snapshot import fleet_of
from sutra_tasks.settings import settings

if TYPE_CHECKING:
    from sutra_tasks.settings import Settings

__all__ = ["DirectRouter", "route"]

SNAPSHOT_AGE_S: Final = 0.1
TIMEOUT_S: Final = 1.0


class DirectRouter:
    """One client process's view of the fleet; safe to use from many threads."""

    def __init__(
        self,
        options: Settings,
        client: redis.Redis,
        *,
        first_ticket: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._options, self._client, self._clock = options, client, clock
        self._lock = threading.Lock()
        self._fleet = Fleet()
        self._read_at = -float("inf")
        self._ticket = first_ticket

    def queue_for(self, headers: Mapping[str, Any]) -> str | None:
        """Return the queue of the device for a message with ``headers``; None: the ordinary way."""
        try:
            demand = demand_of(headers.get(HEADER), 0)
            with self._lock:
                self._refresh()
                if not self._fleet.has_credit:
                    return None
                self._ticket += 1
                device = choose(
                    self._fleet,
                    demand,
                    self._ticket,
                    default=self._options.strategy,
                    queue_penalty_s=self._options.queue_penalty_factor,
                )
                self._fleet = self._fleet.sent(device, demand.tokens)
        except (SutraError, redis.RedisError, OSError):
            return None
        return device.queue

    def _refresh(self) -> None:
        now = self._clock()
        if now - self._read_at >= SNAPSHOT_AGE_S:
            self._read_at = now
            self._fleet = Fleet()  # if the server does not answer
            self._fleet = fleet_of(sightings(self._client), self._options.device_ttl_s)


@cache
def _router() -> DirectRouter:
    options = settings()
    client = broker_client(options, timeout_s=TIMEOUT_S, retries=False)
    return DirectRouter(options, client, first_ticket=secrets.randbelow(2**32))


def route(
    name: str,
    args: Any,  # noqa: ARG001 - the shape of Celery's routers
    kwargs: Any,  # noqa: ARG001 - the same
    options: Mapping[str, Any],
    task: Any = None,  # noqa: ARG001 - the same
    **_: Any,
) -> dict[str, str] | None:
    """Route a call of ``embed`` to a device: an entry of Celery's ``task_routes``."""
    if name != keys.EMBED_TASK:
        return None
    queue = _router().queue_for(options.get("headers") or {})
    return None if queue is None else {"queue": queue}
