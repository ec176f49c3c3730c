"""Ends a task without running it, as Celery's own worker does: its result, chord and callbacks."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from celery.exceptions import InvalidTaskError
from celery.utils.log import get_logger
from celery.worker import state as worker_state
from celery.worker.request import Request

if TYPE_CHECKING:
    from sutra_tasks.errors import SutraError

__all__ = ["fail_task", "revoke_task"]

logger = get_logger(__name__)


def fail_task(message: Any, task: Any, consumer: Any, error: SutraError) -> None:
    """Store an error as the task's result, let its chord and error callbacks know, and acknowledge it.

    Raises:
        RequeueMessage: the results server did not take it.
    """
    try:
        request = _request(message, task, consumer)
    except InvalidTaskError as invalid:
        logger.error("dropped a message that is not a task: %s", invalid)  # noqa: TRY400
        message.ack_log_error(logger, consumer.connection_errors)
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


def revoke_task(message: Any, task: Any, consumer: Any, now: float) -> bool:
    """Store that a task was revoked or has expired, and acknowledge it; return whether that is so."""
    headers = message.headers
    if headers.get("id") not in worker_state.revoked and not _is_expired(headers.get("expires"), now):
        return False
    return bool(_request(message, task, consumer).revoked())


def _request(message: Any, task: Any, consumer: Any) -> Any:
    return Request(
        message,
        app=task.app,
        task=task,
        hostname=consumer.hostname,
        eventer=consumer.event_dispatcher,
        on_ack=message.ack_log_error,
        on_reject=message.reject_log_error,
        connection_errors=consumer.connection_errors,
    )


def _is_expired(expires: Any, now: float) -> bool:
    if not expires:
        return False
    try:
        moment = datetime.fromisoformat(expires)
    except (TypeError, ValueError):
        return False  # not a time: Celery refuses it where the task runs
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return moment.timestamp() <= now
