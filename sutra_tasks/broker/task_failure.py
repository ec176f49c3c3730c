"""Ends a task without running it: stores an error or a revocation, and tells its chord and callbacks.

As Celery's own worker does, but also for a message of which not everything can be read.
"""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import redis
from celery.app.task import Context
from celery.utils.log import get_logger
from celery.worker import state as worker_state
from kombu.exceptions import OperationalError

from sutra_tasks.broker.dead_letters import add_dead_letter
from sutra_tasks.broker.message_check import decode_body, parse
from sutra_tasks.broker.result_backend import RequeueMessage
from sutra_tasks.errors import InvalidMessageError, ResultRefusedError, SutraError
from sutra_tasks.settings import settings

__all__ = ["fail_task", "is_revoked", "revoke_task"]

logger = get_logger(__name__)


def fail_task(
    message: Any, task_id: str, consumer: Any, error: SutraError, client: redis.Redis, *, now: float
) -> None:
    """Store an error as a task's result, tell its chord and error callbacks, and acknowledge it.

    Args:
        message: of the task.
        task_id: under which its caller waits.
        consumer: Celery's, of this worker.
        error: the result.
        client: the broker, for a dead letter.
        now: Unix time in seconds.

    What cannot be told for good becomes a dead letter.

    Raises:
        RequeueMessage: the results server did not take it, and may do so later.
        redis.RedisError: the broker did not take the dead letter, or a callback.
    """
    logger.warning("task %s failed: %s", task_id, error)
    context = _context_of(message.sutra_raw, task_id)
    try:
        consumer.app.backend.mark_as_failure(
            task_id, error, request=context, store_result=not context.ignore_result
        )
    except (RequeueMessage, redis.RedisError, OperationalError):
        raise
    except ResultRefusedError as refused:
        reason = f"{error}; {refused}"
        add_dead_letter(client, task_id, message.sutra_raw, reason=reason, attempts=0, now=now)
    except Exception as failure:
        # Celery stores the result first, so this is about somebody's callbacks, most likely.
        logger.exception("task %s becomes a dead letter: its failure could not be told", task_id)
        reason = f"{error}; telling its callbacks failed: {failure!r}"
        add_dead_letter(client, task_id, message.sutra_raw, reason=reason, attempts=0, now=now)
    _acknowledge(message, consumer, "task-failed", task_id, exception=repr(error), traceback="")


def revoke_task(message: Any, consumer: Any, *, expired: bool) -> None:
    """Store that a task was revoked or has expired, tell its chord, and acknowledge its message.

    Raises:
        RequeueMessage: the results server did not take it, and may do so later.
    """
    context = _context_of(message.sutra_raw, message.headers["id"])
    worker_state.revoked.add(context.id)
    reason = "expired" if expired else "revoked"
    with suppress(ResultRefusedError):  # nothing is lost with what nobody wants any more
        consumer.app.backend.mark_as_revoked(
            context.id, reason, request=context, store_result=not context.ignore_result
        )
    _acknowledge(
        message, consumer, "task-revoked", context.id, terminated=False, signum=None, expired=expired
    )


def is_revoked(headers: Any, now: float) -> tuple[bool, bool]:
    """Return whether a task is revoked or has expired, and whether it has expired."""
    expires = headers.get("expires")
    expired = bool(expires) and _timestamp(expires) <= now
    return expired or headers.get("id") in worker_state.revoked, expired


def _context_of(raw: bytes, task_id: str) -> Context:
    """Return what can be read of a task's message, as Celery's backends know a task."""
    headers: dict[str, Any] = {}
    callbacks: dict[str, Any] = {}
    with suppress(InvalidMessageError, KeyError, TypeError, AttributeError):
        payload = parse(raw)
        headers = payload["headers"]
        _, (_, _, found) = decode_body(payload, most_bytes=settings().max_message_bytes)
        callbacks = found or {}
    known = ("task", "root_id", "parent_id", "group", "group_index")
    usable = {}
    if isinstance(headers, dict):
        usable = {name: headers.get(name) for name in known}
        usable["ignore_result"] = headers.get("ignore_result") is True
    return Context(usable, **callbacks, id=task_id, delivery_info={})


def _acknowledge(message: Any, consumer: Any, event: str, task_id: str, **fields: Any) -> None:
    message.ack_log_error(logger, consumer.connection_errors)
    eventer = consumer.event_dispatcher
    if eventer and eventer.enabled:
        eventer.send(event, uuid=task_id, **fields)


def _timestamp(text: str) -> float:
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).timestamp()
