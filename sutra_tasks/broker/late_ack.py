"""Late acknowledgement for workers with a pool of threads.

The thread that finishes a task acknowledges its message, and requeues it if an error escapes Celery. A
message whose result cannot be stored now is requeued after a pause, which grows while the server goes on
to refuse; one whose result can never be stored becomes a dead letter.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

import redis
from celery.concurrency.thread import ApplyResult
from celery.concurrency.thread import TaskPool as ThreadPool
from celery.utils.log import get_logger
from celery.worker.request import Request as CelerysRequest
from celery.worker.strategy import default as default_strategy

from sutra_tasks.broker.dead_letters import add_dead_letter
from sutra_tasks.broker.refused import FAILED_PAUSE_S, FIRST_PAUSE_S, LONGEST_PAUSE_S
from sutra_tasks.broker.result_backend import RequeueMessage
from sutra_tasks.connections import broker_client
from sutra_tasks.errors import ResultRefusedError
from sutra_tasks.settings import settings

__all__ = ["LateAckPool", "Request", "strategy"]

logger = get_logger(__name__)


def strategy(task: Any, app: Any, consumer: Any) -> Callable[..., Any]:
    """Return Celery's own handler of messages, but for its acknowledgement: that of the calling thread.

    Celery has its event loop acknowledge. The loop has ended when a stopping pool finishes its last
    tasks, which would then run again on another worker.
    """
    handle = default_strategy(task, app, consumer)

    def handler(message: Any, body: Any, ack: Any, reject: Any, callbacks: Any) -> Any:  # noqa: ARG001
        return handle(message, body, message.ack_log_error, message.reject_log_error, callbacks)

    return handler


class Request(CelerysRequest):  # type: ignore[misc]  # Celery is untyped
    """Celery's request, for workers whose tasks run on threads."""

    def terminate(self, pool: Any, signal: Any = None) -> None:
        """Do no more than a revocation does, which has marked the task already.

        A thread cannot be killed: its task looks at the mark between two batches, or steps, and ends.
        """


class LateAckPool(ThreadPool):  # type: ignore[misc]  # Celery is untyped
    """Celery's thread pool, for workers that handle messages by :func:`strategy`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stopping = threading.Event()
        self._refused_since: float | None = None  # monotonic seconds; None: the last result was stored

    def on_apply(
        self,
        target: Callable[..., Any],
        args: Any = None,
        kwargs: Any = None,
        callback: Any = None,
        accept_callback: Any = None,
        **_: Any,
    ) -> ApplyResult:
        """Run one task on a thread."""
        request = callback.__self__  # a method of Celery's request, which has the message
        task = partial(self._run_task, target, args or (), kwargs or {}, callback, accept_callback)
        return ApplyResult(self.submit(request, task))

    def submit(self, request: Any, task: Callable[[], None]) -> Future[None]:
        """Run ``task`` on a thread; a subclass can tell the thread to which ``request`` it belongs."""
        raise NotImplementedError

    def on_stop(self) -> None:
        """Cancel the tasks that have not begun, and wait for those that have."""
        self._stopping.set()
        self.executor.shutdown(cancel_futures=True)
        self._state = self.TERMINATE

    def _run_task(
        self, target: Any, args: Any, kwargs: Any, callback: Any, accept_callback: Any
    ) -> None:
        """Run one task on this thread as Celery's pools do; an error that escapes requeues it."""
        request = callback.__self__
        try:
            accept_callback(os.getpid(), time.monotonic())
            callback(target(*args, **kwargs))
            self._refused_since = None
        except ResultRefusedError as refused:
            _give_up(request, refused)
        except BaseException as error:
            # Nobody reads the future of this thread's work: without this, a message whose result cannot
            # be stored is never acknowledged, and after enough of them the worker takes no more.
            logger.error("task %s is requeued: %r", request.id, error)  # noqa: TRY400
            self._pause(error, request.message)
            request.reject(requeue=True)
            if not isinstance(error, Exception):
                raise

    def _pause(self, error: BaseException, message: Any) -> None:
        """Wait before a message is requeued, the longer the longer the server has stored no results."""
        if isinstance(error, RequeueMessage):
            now = time.monotonic()
            since = self._refused_since = self._refused_since or now
            self._stopping.wait(min(max(now - since, FIRST_PAUSE_S), LONGEST_PAUSE_S))
        else:
            message.sutra_failed = True  # this counts like the death of a worker
            self._stopping.wait(FAILED_PAUSE_S)


def _give_up(request: Any, refused: ResultRefusedError) -> None:
    """Keep a message whose result can never be stored as a dead letter, and acknowledge it."""
    logger.error("task %s becomes a dead letter: %s", request.id, refused)
    raw, reason = request.message.sutra_raw, str(refused)
    try:
        with broker_client(settings()) as client:
            add_dead_letter(client, request.id, raw, reason=reason, attempts=0, now=time.time())
    except redis.RedisError:
        logger.exception("task %s is requeued: it cannot be kept as a dead letter", request.id)
        request.reject(requeue=True)
    else:
        request.acknowledge()
