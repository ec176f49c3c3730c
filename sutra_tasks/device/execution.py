"""How the computation of one task runs: whether alone, and what follows if it has no answer.

A suspect runs alone: while its mark is on the server nothing else of this process computes, so that a
death is blamed on the suspect, and on nobody else.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from celery.exceptions import Ignore, Reject, TaskRevokedError
from celery.worker.state import revoked

from sutra_tasks import keys
from sutra_tasks.batching.jobs import DeviceBroken, Drained, JobContext, Unwanted
from sutra_tasks.batching.shared_lock import SharedLock
from sutra_tasks.broker.attempts import SUSPECT_AFTER, attempts_of
from sutra_tasks.errors import EncodingError

if TYPE_CHECKING:
    import redis

    from sutra_tasks.settings import Settings

__all__ = ["Execution", "is_suspect"]

ROUTERS_KNOW_S: Final = 0.2
"""By then every router knows that a device is broken, and sends the requeued message elsewhere."""


def is_suspect(headers: Mapping[str, Any], max_attempts: int) -> bool:
    """Return whether so many workers died with a message that it must run alone."""
    attempts = attempts_of(headers)
    return attempts > 0 and attempts >= min(SUSPECT_AFTER, max_attempts - 1)


class Execution:
    """The computations of a device worker's tasks, each on the thread of its task.

    Attributes:
        lock: shared by everything that computes on this device, or had by a suspect alone.
    """

    def __init__(self, options: Settings, client: redis.Redis, incarnation: str) -> None:
        """Begin with no task.

        Args:
            options: of this device.
            client: of the server that keeps suspects' marks.
            incarnation: this process's.
        """
        self.lock = SharedLock()
        self._options, self._client = options, client
        self._mark = keys.suspect(incarnation)
        self._current = threading.local()

    def begin(self, request: Any, announcement: object) -> None:
        """Note which task runs on this thread from now on.

        Args:
            request: Celery's, with the message.
            announcement: of the task's job to the batcher.
        """
        # A part is given up by the caller of its long text.
        caller = request.group if request.name == keys.PART_TASK else request.id
        self._current.request = request
        self._current.context = JobContext(partial(_is_wanted, request, caller), announcement)

    @property
    def message(self) -> Any:
        """The message of this thread's task."""
        return self._current.request.message

    @property
    def context(self) -> JobContext:
        """What is known of the job of this thread's task."""
        context: JobContext = self._current.context
        return context

    @contextmanager
    def admitted(self) -> Iterator[JobContext]:
        """Compute inside the block for this thread's task: among others, or alone if it is suspect.

        Raises:
            Ignore: the caller was told that the task is revoked or expired.
            TaskRevokedError: the task is revoked; its caller was not told.
            Reject: the message is requeued, because the device stops or is broken.
            EncodingError: the device is broken, and the message has no attempt left.
        """
        request, options = self._current.request, self._options
        headers = request.message.headers
        try:
            alone = is_suspect(headers, options.max_attempts)
            with self._marked(request.id) if alone else self.lock.shared():
                yield self.context
        except Unwanted:
            if request.revoked():  # says so to its caller, or its chord
                raise Ignore from None
            raise TaskRevokedError("revoked") from None
        except Drained:
            raise Reject(f"device {options.device_id} is stopping", requeue=True) from None
        except DeviceBroken as error:
            if attempts_of(headers) + 1 >= options.max_attempts:
                raise EncodingError(
                    str(options.device_id), error.position, "the device is broken"
                ) from None
            request.message.sutra_failed = True
            time.sleep(ROUTERS_KNOW_S)
            raise Reject(f"device {options.device_id} is broken", requeue=True) from None

    @contextmanager
    def _marked(self, task_id: str) -> Iterator[None]:
        """Run a suspect inside the block, alone and with its mark on the server."""
        with self.lock.exclusive():
            self._client.set(self._mark, task_id, ex=keys.FORGET_AFTER_S)
            try:
                yield
            finally:
                self._client.delete(self._mark)


def _is_wanted(request: Any, caller: str) -> bool:
    """Return whether a task is neither revoked, by the id that its caller has, nor expired."""
    return caller not in revoked and not request.maybe_expire()
