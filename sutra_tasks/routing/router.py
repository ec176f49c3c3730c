"""The router worker: it forwards messages to devices, byte for byte, and computes nothing.

Celery runs the ``embed`` task of this worker by a ``Task.Strategy``: :func:`strategy` hands each message
to the :class:`Router`, which moves it from its in-flight list to the device's queue in one step. The
body is never decoded, so compression, priority, ``expires``, stamps and retries arrive as they were
sent, and the caller's task stays one task. ADR 001 has the figures.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import redis
from celery.utils.log import get_logger

from sutra_tasks import keys
from sutra_tasks.broker.attempts import attempts_of
from sutra_tasks.broker.dead_letters import add_dead_letter
from sutra_tasks.broker.queues import queue_lengths
from sutra_tasks.broker.refused import growing_pause_s
from sutra_tasks.broker.result_backend import RequeueMessage
from sutra_tasks.broker.task_failure import fail_task, is_revoked, revoke_task
from sutra_tasks.client.call import HEADER, demand_of
from sutra_tasks.errors import PoisonMessageError, SutraError
from sutra_tasks.routing.decision import decide
from sutra_tasks.routing.fleet_view import FleetView
from sutra_tasks.routing.report import RouterRecord, backlog_of, publish

if TYPE_CHECKING:
    from collections.abc import Callable

    from sutra_tasks.routing.snapshot import Device
    from sutra_tasks.settings import Settings

__all__ = ["Router", "strategy"]

logger = get_logger(__name__)

REPORT_S: Final = 1.0
RECENT_MESSAGES: Final = 256
"""The tokens of a queued message are estimated from about so many messages before it."""


@dataclass(frozen=True, slots=True)
class _Arrival:
    """A message of this router, in flight until it is forwarded or its task ends.

    Attributes:
        message: as Celery delivered it.
        seen_at: Unix seconds when this router took it.
        has_waited: whether it was handled before.
        tries: times in a row that a server, or this code, failed with it.
        errors: times that this code failed with it.
        due_at: monotonic seconds before which it is not handled again.
    """

    message: Any
    seen_at: float
    has_waited: bool = False
    tries: int = 0
    errors: int = 0
    due_at: float = 0.0


class Router:
    """The routing of one process: its view of the fleet, and the messages that wait for a device."""

    def __init__(
        self,
        options: Settings,
        client: redis.Redis,
        name: str,
        *,
        incarnation: str,
        first_ticket: int = 0,
        now: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare; :meth:`attach` gives it a connection.

        Args:
            options: with the strategy and the limits.
            client: the broker.
            name: of this worker.
            incarnation: this start of it.
            first_ticket: number of its first message; routers differ in it, so that they do not all
                begin with the same device.
            now: Unix time in seconds.
            monotonic: monotonic seconds.
        """
        self._options, self._client, self._name = options, client, name
        self._incarnation = incarnation
        self._now, self._monotonic = now, monotonic
        self._view = FleetView(client, options.device_ttl_s, clock=monotonic)
        self._reported_at = -float("inf")
        self._first_ticket = self._ticket = first_ticket
        self._mean_tokens = 0.0
        self._waiting: list[_Arrival] = []
        self._consumer: Any = None

    def attach(self, consumer: Any) -> None:
        """Serve a new connection; the messages that waited on the last one have been requeued."""
        self._consumer = consumer
        self._waiting.clear()

    def route(self, message: Any) -> None:
        """Forward a message, keep it until a device is live, or end its task."""
        self._handle(_Arrival(message, self._now()))

    def may_take(self, queue: str) -> bool:
        """Say whether to take more messages from ``queue``.

        None from the queue of texts while no device has credit: they wait in the queue, where priorities
        apply. Without any device they are taken, and wait or fail here.
        """
        if queue != keys.EMBED_QUEUE:
            return True
        try:
            fleet = self._view.read()
        except redis.RedisError:
            return True  # they wait here until the fleet can be read
        # Messages that wait here for a device go first; one that waits for a server delays no other.
        first = any(not one.tries for one in self._waiting)
        return not fleet.devices or (fleet.has_credit and not first)

    def tick(self) -> None:
        """Handle the waiting messages again, and report; called a few times a second."""
        try:
            if self._waiting:
                self._view.read()
            if self._monotonic() - self._reported_at >= REPORT_S:
                self._report()
        except redis.RedisError as error:
            logger.warning("cannot look at the fleet, trying again: %s", error)
            return
        waiting, self._waiting = self._waiting, []
        for arrival in waiting:
            if arrival.due_at <= self._monotonic():
                self._handle(arrival)
            else:
                self._waiting.append(arrival)

    def _handle(self, arrival: _Arrival) -> None:
        tries, errors = arrival.tries + 1, arrival.errors
        try:
            if self._forward_or_end(arrival):
                return
            tries = 0
        except (RequeueMessage, redis.RedisError) as error:
            if tries == 1:
                task_id = arrival.message.headers["id"]
                logger.warning("task %s waits for the server: %s", task_id, error)
        except Exception:
            # Its error must end no worker and delay no other message; it counts like a worker's death.
            logger.exception("a message could not be handled; it counts an attempt")
            errors += 1
        due_at = self._monotonic() + (growing_pause_s(tries) if tries else 0.0)
        self._waiting.append(
            replace(arrival, has_waited=True, tries=tries, errors=errors, due_at=due_at)
        )

    def _forward_or_end(self, arrival: _Arrival) -> bool:
        """Forward a message, or end its task; return False if it has to wait."""
        message, now = arrival.message, self._now()
        attempts = attempts_of(message.headers) + arrival.errors
        if attempts >= self._options.max_attempts:
            self._give_up(message, attempts, now)
            return True
        revoked, expired = is_revoked(message.headers, now)
        if revoked:
            revoke_task(message, self._consumer, expired=expired)
            return True
        try:
            demand = demand_of(message.headers.get(HEADER), len(message.body or ""))
            fleet = self._view.read()
            device = decide(
                demand,
                fleet,
                ticket=self._ticket,
                seen_at=arrival.seen_at,
                now=now,
                outage_s=self._view.outage_s,
                has_waited=arrival.has_waited,
                options=self._options,
            )
        except SutraError as error:
            fail_task(message, message.headers["id"], self._consumer, error, self._client, now=now)
            return True
        if device is None:
            if not (fleet.devices or arrival.has_waited or self._waiting):
                logger.warning(
                    "no live device (%d known): messages wait up to %g s",
                    fleet.known,
                    self._options.no_device_wait_s,
                )
            return False
        message.channel.forward(message, device.id)
        self._count(device, demand.tokens)
        return True

    def _give_up(self, message: Any, attempts: int, now: float) -> None:
        """Keep a message as a dead letter, and tell its caller."""
        task_id = message.headers["id"]
        poison = PoisonMessageError(attempts, "workers died or failed with it")
        add_dead_letter(
            self._client, task_id, message.sutra_raw, reason=poison.reason, attempts=attempts, now=now
        )
        fail_task(message, task_id, self._consumer, poison, self._client, now=now)

    def _count(self, device: Device, tokens: int) -> None:
        self._ticket += 1
        self._view.count_sent(device, tokens)
        recent = min(self._ticket - self._first_ticket, RECENT_MESSAGES)
        self._mean_tokens += (tokens - self._mean_tokens) / recent

    def _report(self) -> None:
        self._reported_at = self._monotonic()
        queued = queue_lengths(self._client, [keys.EMBED_QUEUE])[keys.EMBED_QUEUE]
        record = RouterRecord(
            name=self._name,
            pid=os.getpid(),
            incarnation=self._incarnation,
            routed=self._ticket - self._first_ticket,
            waiting=len(self._waiting),
        )
        backlog = backlog_of(self._view.latest, queued, self._mean_tokens)
        publish(self._client, backlog, record, self._options.device_ttl_s)


def strategy(task: Any, app: Any, consumer: Any) -> Callable[..., None]:  # noqa: ARG001 - Celery's hook
    """Route every message of ``task``. Celery builds it anew on each reconnect: it acquires nothing."""
    router: Router = consumer.controller.sutra_router

    def handler(message: Any, body: Any, ack: Any, reject: Any, callbacks: Any) -> None:  # noqa: ARG001
        router.route(message)

    return handler
