"""The router worker: it passes messages on to devices, exactly as they came, and computes nothing.

The ``embed`` task, as this worker runs it, is the router task: a Celery ``Task.Strategy`` that chooses
a device from a snapshot at most 100 ms old and moves the message from the router's held list to the
device's queue in one step. The body is never decoded, so compression, priority, ``expires``, stamps
and retries arrive as they were sent, and the caller's task stays one task. ADR 001 has the figures.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import redis
from celery.exceptions import InvalidTaskError
from celery.utils.log import get_logger
from celery.worker import state as worker_state
from celery.worker.request import Request

from sutra_tasks import keys
from sutra_tasks.broker.dead_letters import bury
from sutra_tasks.broker.queues import MOST_CREDIT
from sutra_tasks.broker.requeue import attempts_of
from sutra_tasks.broker.result_backend import NotStored
from sutra_tasks.client.admission import Backlog
from sutra_tasks.client.call import HEADER, Demand, demand_of
from sutra_tasks.errors import NoHealthyWorkersError, PoisonMessageError, SutraError
from sutra_tasks.membership.devices import queue_lengths, sightings
from sutra_tasks.routing.balancing import Fleet, choose
from sutra_tasks.routing.snapshot import fleet_of

if TYPE_CHECKING:
    from sutra_tasks.settings import Settings

__all__ = ["Router", "strategy", "waited_s"]

logger = get_logger(__name__)

SNAPSHOT_AGE_S: Final = 0.1
RETRY_S: Final = 0.1
REPORT_S: Final = 1.0
RECENT_MESSAGES: Final = 256
"""What a waiting message weighs is judged by about so many before it."""

VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A message that found no device; it stays held by this router meanwhile."""

    message: Any
    task: Any
    demand: Demand
    since: float


_NO_DEMAND: Final = Demand(texts=1, bytes=0, sent_at=None, strategy=None)
"""Of a message that was not looked at: it will be again."""


def waited_s(demand: Demand, *, seen_at: float, now: float) -> float:
    """Return how long a message has been waiting for a device.

    Counted from when it was sent, so that a backlog does not wait once more for each message in front
    of it; a sender's clock that runs ahead only makes it wait longer.
    """
    sent_at = seen_at if demand.sent_at is None else min(demand.sent_at, seen_at)
    return max(0.0, now - sent_at)


class Router:
    """One process's routing: the snapshot, the ticket counter, and what waits for a device."""

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
        self._options, self._client, self._name = options, client, name
        self._incarnation = incarnation
        self._now, self._monotonic = now, monotonic
        self._fleet = Fleet()
        self._fleet_read_at = self._reported_at = -float("inf")
        self._first_ticket = self._ticket = first_ticket
        self._mean_tokens = 0.0
        self._waiting: list[_Waiting] = []
        self._consumer: Any = None
        # An outage begins when this router first sees no device, not when a message was sent.
        self._no_device_since: float | None = None

    def attach(self, consumer: Any) -> None:
        """Serve a new connection; what waited on the old one has gone back to its queue."""
        self._consumer = consumer
        self._waiting.clear()

    def route(self, message: Any, task: Any) -> None:
        """Pass a message on, keep it until a device lives, or fail its task."""
        try:
            self._route(message, task)
        except Exception as error:
            # It is still held; whatever is wrong must end no worker, and cost the others no turn.
            if isinstance(error, NotStored | redis.RedisError):
                logger.warning("task %s waits for the server: %s", message.headers.get("id"), error)
            else:
                logger.exception("a message could not be handled, trying again")
            self._waiting.append(_Waiting(message, task, _NO_DEMAND, self._now()))

    def _route(self, message: Any, task: Any) -> None:
        headers = message.headers
        if attempts_of(headers) >= self._options.max_attempts:
            self._give_up(message, task)
            return
        if headers.get("id") in worker_state.revoked and self._request(message, task).revoked():
            return
        try:
            demand = demand_of(headers.get(HEADER), len(message.body or ""))
        except SutraError as error:
            self._fail(message, task, error)
            return
        try:
            fleet = self._snapshot()
            if demand.tokens > MOST_CREDIT and fleet.standing and not fleet.has_credit:
                # Several were taken at once: what is large would pile up before one device.
                self._waiting.append(_Waiting(message, task, demand, self._now()))
                return
            device = choose(
                fleet,
                demand,
                self._ticket,
                default=self._options.strategy,
                queue_penalty_s=self._options.queue_penalty_factor,
            )
        except (NoHealthyWorkersError, redis.RedisError):
            self._wait(_Waiting(message, task, demand, self._now()))
        except SutraError as error:
            self._fail(message, task, error)
        else:
            self._ticket += 1
            self._fleet = self._fleet.sent(device, demand.tokens)
            recent = min(self._ticket - self._first_ticket, RECENT_MESSAGES)
            self._mean_tokens += (demand.tokens - self._mean_tokens) / recent
            message.channel.forward(message, device.id)

    def may_take(self, queue: str) -> bool:
        """Say whether to take more from ``queue``.

        No texts while every device has as much ahead as it should: backlog waits in the router's queue,
        where priorities apply. With no device at all work is taken, to wait or fail here.
        """
        if queue != keys.EMBED_QUEUE:
            return True
        try:
            fleet = self._snapshot()
        except redis.RedisError:
            return True  # what is taken waits for the next look
        # What waits here goes first.
        return not fleet.standing or (fleet.has_credit and not self._waiting)

    def tick(self) -> None:
        """Try again what waits, and report; called a few times a second."""
        now = self._now()
        try:
            fleet = self._snapshot() if self._waiting else self._fleet
            if self._monotonic() - self._reported_at >= REPORT_S:
                self._report()
        except redis.RedisError as error:
            logger.warning("cannot look at the fleet, trying again: %s", error)
            return
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            try:
                self._retry(one, fleet, now)
            except (NotStored, redis.RedisError):
                self._waiting.append(one)
            except Exception:
                # It is still held; whatever is wrong with it must not cost the others their turn.
                logger.exception("a waiting message could not be handled, trying again")
                self._waiting.append(one)

    def _retry(self, one: _Waiting, fleet: Fleet, now: float) -> None:
        if _expired(one.message.headers.get("expires"), now):
            if not self._request(one.message, one.task).revoked():  # the clock stepped back
                self._waiting.append(one)
        elif fleet.devices:
            # Not all at once to the first device that comes back: the others follow in a moment.
            if self._fleet.has_credit:
                self.route(one.message, one.task)
            else:
                self._waiting.append(one)
        elif self._gave_up(one, now):
            waited = round(waited_s(one.demand, seen_at=one.since, now=now), 1)
            error = NoHealthyWorkersError(fleet.known, fleet.oldest_heartbeat_s, waited)
            self._fail(one.message, one.task, error)
        else:
            self._waiting.append(one)

    def _gave_up(self, one: _Waiting, now: float) -> bool:
        patience = self._options.no_device_wait_s
        # Sent long ago but only now without a device (a backlog): it waits as long as any other.
        outage_s = now - (self._no_device_since or now)
        waited = waited_s(one.demand, seen_at=one.since, now=now)
        return outage_s >= patience and waited >= patience

    def _snapshot(self) -> Fleet:
        now = self._monotonic()
        if now - self._fleet_read_at >= SNAPSHOT_AGE_S:
            self._fleet = fleet_of(sightings(self._client), self._options.device_ttl_s)
            self._fleet_read_at = now
            if self._fleet.devices:
                self._no_device_since = None
            elif self._no_device_since is None:
                self._no_device_since = self._now()
        return self._fleet

    def _wait(self, one: _Waiting) -> None:
        if not self._waiting:
            logger.warning(
                "no live device (%d known): messages wait up to %g s",
                self._fleet.known,
                self._options.no_device_wait_s,
            )
        self._waiting.append(one)

    def _give_up(self, message: Any, task: Any) -> None:
        """Keep a message that workers died of as a dead letter, and fail its task."""
        error = PoisonMessageError(attempts_of(message.headers), "workers died or failed with it")
        bury(self._client, message.headers.get("id"), message.sutra_raw, error, now=self._now())
        self._fail(message, task, error)

    def _request(self, message: Any, task: Any) -> Any:
        return Request(
            message,
            app=task.app,
            task=task,
            hostname=self._consumer.hostname,
            eventer=self._consumer.event_dispatcher,
            on_ack=message.ack_log_error,
            on_reject=message.reject_log_error,
            connection_errors=self._consumer.connection_errors,
        )

    def _fail(self, message: Any, task: Any, error: SutraError) -> None:
        """Store the error as the task's result, and let its chord and error callbacks know."""
        try:
            request = self._request(message, task)
        except InvalidTaskError as invalid:
            logger.error("dropped a message that is not a task: %s", invalid)  # noqa: TRY400
            message.ack_log_error(logger, self._consumer.connection_errors)
            return
        logger.warning("task %s failed: %s", request.id, error)
        task.backend.mark_as_failure(
            request.id,
            error,
            request=request._context,  # noqa: SLF001 - as Celery's own worker does
            store_result=request.store_errors,
        )
        request.acknowledge()
        request.send_event("task-failed", exception=repr(error), traceback="")

    def _report(self) -> None:
        self._reported_at = self._monotonic()
        queued = queue_lengths(self._client, [keys.EMBED_QUEUE])[keys.EMBED_QUEUE]
        devices = self._fleet.standing
        backlog = Backlog(
            tokens=round(queued * self._mean_tokens) + sum(one.backlog_tokens for one in devices),
            tokens_per_s=sum(one.tokens_per_s or 0.0 for one in devices),
        )
        record = {
            "v": VERSION,
            "name": self._name,
            "pid": os.getpid(),
            "incarnation": self._incarnation,
            "routed": self._ticket - self._first_ticket,
            "waiting": len(self._waiting),
        }
        with self._client.pipeline(transaction=False) as pipe:
            pipe.set(keys.BACKLOG, backlog.to_json(), ex=keys.BACKLOG_S)
            pipe.set(
                keys.router(self._name), json.dumps(record), px=int(1000 * self._options.device_ttl_s)
            )
            pipe.execute()


def _expired(expires: Any, now: float) -> bool:
    try:
        moment = datetime.fromisoformat(expires or "")
    except (TypeError, ValueError):
        return False  # not set, or not a time: Celery refuses it where the task runs
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return moment.timestamp() <= now


def strategy(task: Any, app: Any, consumer: Any) -> Callable[..., None]:  # noqa: ARG001 - Celery's hook
    """Route every message of ``task``. Celery builds it anew on each reconnect: it acquires nothing."""
    router: Router = consumer.controller.sutra_router

    def handler(message: Any, body: Any, ack: Any, reject: Any, callbacks: Any) -> None:  # noqa: ARG001
        router.route(message, task)

    return handler
