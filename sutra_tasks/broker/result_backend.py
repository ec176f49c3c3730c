"""The workers' result backend: Celery's own for Redis, with one round trip where it makes two.

Celery reads a task's stored state before each write, to keep a success final, and then sends the vectors
twice, to be stored and to be published. Here a script decides on the server, where nothing can come in
between, and the vectors travel once. Clients read results with the stock backend.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import redis
from celery import states
from celery.backends.redis import RedisBackend
from celery.exceptions import Reject
from kombu.exceptions import OperationalError

from sutra_tasks import keys, lua

__all__ = ["LeaseEnded", "NotStored", "ResultBackend", "as_not_stored"]

OF_THE_SERVER: Final = (redis.RedisError, OperationalError)
"""What goes wrong with the server, or with sending a callback through it; never with a text."""

STORE_RESULT: Final = lua.script("broker/store_result")


class NotStored(Reject):  # type: ignore[misc]  # Celery is untyped
    """What became of a task could not be stored, so its message must go back.

    A ``Reject``, which Celery's tracing passes on: anything else it would store as the task's failure,
    as soon as the server takes it.
    """

    def __init__(self, reason: object) -> None:
        super().__init__(repr(reason), requeue=True)


class LeaseEnded(NotStored):
    """This process was silent for too long: others do its work, and no failure it tells of counts.

    A message it took since then is nobody else's; hence it goes back, too.
    """

    def __init__(self) -> None:
        super().__init__("the lease of this worker ended")


class ResultBackend(RedisBackend):  # type: ignore[misc]  # Celery is untyped
    """``result_backend`` of the workers."""

    @property
    def _mark(self) -> str:
        return keys.reaped(self.app.conf.broker_transport_options.get("incarnation", ""))

    def mark_as_failure(
        self, task_id: str, exc: Any, traceback: Any = None, request: Any = None,
        store_result: bool = True, **options: Any,
    ) -> None:  # fmt: skip
        """Store an error and let its chord know.

        Raises:
            NotStored: it is not the task's but the server's, or the server did not take it.
            LeaseEnded: others do this process's work by now; nobody was told.
        """
        # Also of a task whose result nobody wants: its chord and its callbacks hear of it.
        if isinstance(exc, OF_THE_SERVER):
            raise NotStored(exc)
        self._check_lease()
        super().mark_as_failure(task_id, exc, traceback, request, store_result, **options)
        self.on_settled(task_id, request)

    def mark_as_done(
        self, task_id: str, result: Any, request: Any = None, store_result: bool = True, **options: Any
    ) -> None:
        """Store a success, and let its chord know.

        Raises:
            NotStored: the server did not take it.
        """
        super().mark_as_done(task_id, result, request, store_result, **options)
        self.on_settled(task_id, request)

    def mark_as_revoked(
        self, task_id: str, reason: str = "", request: Any = None, store_result: bool = True,
        **options: Any,
    ) -> None:  # fmt: skip
        """Store that a task was given up, and let its chord know.

        Raises:
            NotStored: the server did not take it.
            LeaseEnded: others do this process's work by now; nobody was told.
        """
        self._check_lease()
        super().mark_as_revoked(task_id, reason, request, store_result, **options)
        self.on_settled(task_id, request)

    def on_settled(self, task_id: str, request: Any) -> None:
        """Do nothing; a subclass releases what it kept for a task whose outcome is now stored."""

    def _check_lease(self) -> None:
        with as_not_stored():
            ended = self.client.exists(self._mark)
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
            lease_ended=self._mark,
            record=self.encode(meta),
            ttl_s=int(expires),
            state=state,
        )
        with as_not_stored():
            stored = self.ensure(store, ())
        if stored == -1:
            raise LeaseEnded
        return result


@contextmanager
def as_not_stored() -> Iterator[None]:
    """Raise what goes wrong with the server as :class:`NotStored`, so that the message goes back."""
    try:
        yield
    except (*OF_THE_SERVER, OSError) as error:
        raise NotStored(error) from error
