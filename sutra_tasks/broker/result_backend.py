"""The workers' result backend: Celery's own for Redis, with one round trip where it makes two.

Celery reads a task's stored state before each write, to keep a success final, and then sends the vectors
twice, to be stored and to be published. Here a script decides on the server, where nothing happens in
between, and the vectors are sent once. Clients read results with Celery's own backend.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import redis
from celery import states
from celery.exceptions import Reject
from kombu.exceptions import OperationalError

from sutra_tasks import keys, lua
from sutra_tasks.client import results
from sutra_tasks.errors import ResultRefusedError
from sutra_tasks.server_errors import is_permanent, server_words

__all__ = ["LeaseEnded", "RequeueMessage", "ResultBackend", "requeue_if_server_fails"]

SERVER_ERRORS: Final = (redis.RedisError, OperationalError)
"""Errors of the server, or of sending a callback through it; a task's own work raises neither."""

STORE_RESULT: Final = lua.script("broker/store_result")


class RequeueMessage(Reject):  # type: ignore[misc]  # Celery is untyped
    """Raised when the server failed to do what a task needs: the task's message is requeued.

    A ``Reject``, because Celery stores any other error as the task's failure once the server is back.
    """

    def __init__(self, reason: object) -> None:
        super().__init__(repr(reason), requeue=True)


class LeaseEnded(RequeueMessage):
    """The lease of this process ended: other workers do its work, and it stores no errors.

    The message is requeued, too, because the process may have taken it after its lease ended.
    """

    def __init__(self) -> None:
        super().__init__("the lease of this worker ended")


class ResultBackend(results.Backend):
    """``result_backend`` of the workers."""

    @property
    def _lease_ended_key(self) -> str:
        return keys.reaped(self.app.conf.broker_transport_options.get("incarnation", ""))

    def mark_as_failure(
        self, task_id: str, exc: Any, traceback: Any = None, request: Any = None,
        store_result: bool = True, **options: Any,
    ) -> None:  # fmt: skip
        """Store an error and tell the task's chord.

        Raises:
            RequeueMessage: the error is the server's and not the task's, or the server did not store it.
            LeaseEnded: other workers do this process's work; nothing was stored.
            ResultRefusedError: the server does not store it, now or later.
        """
        # Also where the result is ignored: the task's chord and its callbacks hear of the error.
        if isinstance(exc, SERVER_ERRORS):
            raise RequeueMessage(exc)
        self._check_lease()
        super().mark_as_failure(task_id, exc, traceback, request, store_result, **options)
        self.on_outcome_stored(task_id, request)

    def mark_as_done(
        self, task_id: str, result: Any, request: Any = None, store_result: bool = True, **options: Any
    ) -> None:
        """Store a success and tell the task's chord; where it is refused for good, store that.

        Raises:
            RequeueMessage: the server did not store it.
            ResultRefusedError: the server stores neither the result nor that it was refused.
        """
        try:
            super().mark_as_done(task_id, result, request, store_result, **options)
        except ResultRefusedError as refused:
            self.mark_as_failure(task_id, refused, request=request, store_result=store_result)
        else:
            self.on_outcome_stored(task_id, request)

    def mark_as_revoked(
        self, task_id: str, reason: str = "", request: Any = None, store_result: bool = True,
        **options: Any,
    ) -> None:  # fmt: skip
        """Store that a task was revoked and tell its chord.

        Raises:
            RequeueMessage: the server did not store it.
            LeaseEnded: other workers do this process's work; nothing was stored.
            ResultRefusedError: the server does not store it, now or later.
        """
        self._check_lease()
        super().mark_as_revoked(task_id, reason, request, store_result, **options)
        self.on_outcome_stored(task_id, request)

    def on_outcome_stored(self, task_id: str, request: Any) -> None:
        """Do nothing; a subclass frees what it kept for a task whose outcome is stored."""

    def _check_lease(self) -> None:
        with requeue_if_server_fails():
            ended = self.client.exists(self._lease_ended_key)
        if ended:
            raise LeaseEnded

    def _store_result(
        self,
        task_id: str,
        result: Any,
        state: str,
        traceback: Any = None,
        request: Any = None,
        **_: Any,
    ) -> Any:
        meta = self._get_result_meta(result=result, state=state, traceback=traceback, request=request)
        meta["task_id"] = task_id
        expires = self.failure_expires if state == states.FAILURE else self.expires
        store = partial(
            STORE_RESULT,
            self.client,
            result=self.get_key_for_task(task_id),
            lease_ended=self._lease_ended_key,
            record=self.encode(meta),
            ttl_s=int(expires),
            state=state,
        )
        with requeue_if_server_fails():
            stored = self.ensure(store, ())
        if stored == -1:
            raise LeaseEnded
        return result


@contextmanager
def requeue_if_server_fails() -> Iterator[None]:
    """Raise errors of the server as :class:`RequeueMessage`.

    Raises:
        RequeueMessage: the server did not do it, and may do so later.
        ResultRefusedError: it never will, for a missing right or the wrong type of a key, say.
    """
    try:
        yield
    except (*SERVER_ERRORS, OSError) as error:
        if isinstance(error, redis.RedisError) and is_permanent(error):
            raise ResultRefusedError(server_words(error)) from error
        raise RequeueMessage(error) from error
