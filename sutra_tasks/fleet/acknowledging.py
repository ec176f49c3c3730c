"""How workers with threads handle a message: as Celery does, but for where it is acknowledged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery.worker.strategy import default as default_strategy

__all__ = ["strategy"]


def strategy(task: Any, app: Any, consumer: Any) -> Callable[..., Any]:
    """Handle a message as Celery does, but acknowledge from the thread that finished it.

    Celery hands acknowledgements to its event loop, which has ended when a stopping pool finishes its
    last tasks; those would run again elsewhere.
    """
    handle = default_strategy(task, app, consumer)

    def handler(message: Any, body: Any, ack: Any, reject: Any, callbacks: Any) -> Any:  # noqa: ARG001
        return handle(message, body, message.ack_log_error, message.reject_log_error, callbacks)

    return handler
