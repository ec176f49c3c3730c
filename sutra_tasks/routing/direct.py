"""Routing in the client, which saves the hop through the router.

    from sutra_tasks import app
    app.conf.task_routes = ["sutra_tasks.routing.direct.route"]

Calls then go straight to the queue of a device, chosen by the same functions over the same snapshot.
Its costs: each client process reads the snapshot itself, ten times a second while it sends; clients
see each other's calls only once a device has taken them; priorities apply in the device's queue only.
Without a device that has credit, a call takes the ordinary way, and waits in the router's queue.
"""

from __future__ import annotations

import secrets
import threading
import time
from functools import cache
from typing import TYPE_CHECKING, Any, Final

import redis

from sutra_tasks import keys
from sutra_tasks.app import app
from sutra_tasks.client.call import HEADER, demand_of
from sutra_tasks.connections import abandon, broker_client
from sutra_tasks.errors import SutraError
from sutra_tasks.routing.balancing import choose
from sutra_tasks.routing.fleet_view import FleetView
from sutra_tasks.settings import settings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sutra_tasks.settings import Settings

__all__ = ["DirectRouter", "route"]

TIMEOUT_S: Final = 1.0


class DirectRouter:
    """Routes the calls of one client process; safe to use from many threads."""

    def __init__(
        self,
        options: Settings,
        client: redis.Redis,
        *,
        first_ticket: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare.

        Args:
            options: with the strategy.
            client: the broker.
            first_ticket: number of the first call.
            clock: monotonic seconds.
        """
        self._options = options
        self._lock, self._client = threading.Lock(), client
        self._view = FleetView(client, options.device_ttl_s, clock=clock)
        self._ticket = first_ticket

    def queue_for(self, headers: Mapping[str, Any]) -> str | None:
        """Return the queue of the device for a message with ``headers``; None: the router's queue."""
        try:
            demand = demand_of(headers.get(HEADER), 0)
            with self._lock:
                fleet = self._view.read()
                if not fleet.has_credit:
                    return None
                self._ticket += 1
                device = choose(
                    fleet,
                    demand,
                    self._ticket,
                    default=self._options.strategy,
                    queue_penalty_s=self._options.queue_penalty_factor,
                )
                self._view.count_sent(device, demand.tokens)
        except SutraError:
            return None
        except (redis.RedisError, OSError):
            self._view.clear()  # calls must not wait for its timeout one after the other
            return None
        return device.queue

    def abandon(self) -> None:
        """Close, in a forked child, the connections of the parent; it makes a router of its own."""
        abandon(self._client.connection_pool)


@cache
def _router() -> DirectRouter:
    options = settings()
    client = broker_client(options, timeout_s=TIMEOUT_S, retries=False)
    return DirectRouter(options, client, first_ticket=secrets.randbelow(2**32))


@app.on_after_fork.connect(weak=False)  # type: ignore[untyped-decorator]  # Celery is untyped
def _forget_router(**_: Any) -> None:
    if _router.cache_info().currsize:
        _router().abandon()
        _router.cache_clear()


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
