"""How workers with threads handle a message: as Celery does, but for where it is acknowledged.

And how a thread runs its task: whatever escapes Celery, the message goes back.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from celery.utils.log import get_logger
from celery.worker.strategy import default as default_strategy

__all__ = ["run_task", "strategy"]

logger = get_logger(__name__)


def strategy(task: Any, app: Any, consumer: Any) -> Callable[..., Any]:
    """Handle a message as Celery does, but acknowledge from the thread that finished it.

    Celery hands acknowledgements to its event loop, which has ended when a stopping pool finishes its
    last tasks; those would run again elsewhere.
    """
    handle = default_strategy(task, app, consumer)

    def handler(message: Any, body: Any, ack: Any, reject: Any, callbacks: Any) -> Any:  # noqa: ARG001
        return handle(message, body, message.ack_log_error, message.reject_log_error, callbacks)

    return handler


def run_task(target: Any, args: Any, kwargs: Any, callback: Any, accept_callback: Any) -> None:
    """Run one task on this thread, and tell Celery of it."""
    request = callback.__self__  # a method of Celery's request, which has the message
    try:
        accept_callback(os.getpid(), time.monotonic())
        callback(target(*args, **kwargs))
    except BaseException as error:
        # What escapes Celery's tracing (results cannot be stored, say) would end in a future nobody
        # reads: no acknowledgement, and after enough of them a worker that is deaf.
        logger.error("task %s goes back to its queue: %r", request.id, error)  # noqa: TRY400
        request.reject(requeue=True)
        if not isinstance(error, Exception):
            raise
