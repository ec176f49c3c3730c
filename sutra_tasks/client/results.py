"""Results as clients await them: an outage of the results server ends no wait."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

import redis
from celery.backends.redis import RedisBackend, ResultConsumer
from celery.result import AsyncResult
from kombu.exceptions import DecodeError

from sutra_tasks.errors import SutraError

__all__ = ["EmbedResult", "ResultBackend", "ResultsServerDown"]

logger = logging.getLogger(__name__)

RECONNECT_PAUSE_S: Final = 0.2
"""Seconds between two tries to reach a server that does not answer."""


class ResultsServerDown(redis.ConnectionError):
    """The results server does not answer, and may answer later.

    It is a class of its own because a task may itself have failed with a ``ConnectionError``.
    """


@contextmanager
def _as_server_down() -> Iterator[None]:
    """Raise errors of the connection as :class:`ResultsServerDown`."""
    try:
        yield
    except redis.AuthenticationError:
        raise  # a wrong password stays wrong
    except (redis.ConnectionError, redis.TimeoutError) as error:
        raise ResultsServerDown(*error.args) from error


class PatientConsumer(ResultConsumer):  # type: ignore[misc]  # Celery is untyped
    """Celery's reader of results, except that no outage ends a wait: only the caller's timeout does."""

    _pubsub: Any
    _disconnected = False
    _outage_logged = False

    def _reconnect(self) -> None:
        # Only disconnect: a garbage collection may have called this, with a lock that threads wait for.
        lost, self._pubsub, self._disconnected = self._pubsub, None, True
        if lost is not None and lost.connection is not None:
            lost.connection.disconnect()

    def resubscribe(self) -> None:
        """After an outage, subscribe again and read the results that were stored meanwhile.

        Raises:
            redis.ConnectionError, redis.TimeoutError: the server still does not answer.
        """
        with self._locked():
            if not self._disconnected:
                return
            client = self.backend.client
            self._pubsub = pubsub = client.pubsub(ignore_subscribe_messages=True)
            if names := list(self.subscribed_to):
                # Read behind the subscription, or a result stored between the two would be missed.
                pubsub.subscribe(*names)
                for stored in filter(None, client.mget(names)):
                    self.on_state_change(self._decode_result(stored), None)
            self._disconnected = self._outage_logged = False

    def drain_events(self, timeout: float | None = None) -> None:
        """Read the results that arrive within ``timeout``, or try to reach a server that is down."""
        try:
            with _as_server_down():
                self.resubscribe()
        except ResultsServerDown as error:
            if not self._outage_logged:
                logger.warning("waiting for the server with the results: %s", error)
                self._outage_logged = True
            time.sleep(RECONNECT_PAUSE_S)
        else:
            super().drain_events(timeout)

    def on_wait_for_pending(self, result: Any, **options: Any) -> None:
        """Read a result that is stored already; if the server is down, :meth:`resubscribe` reads it.

        Results that were published are read first, so that they need not be fetched and decoded again.
        """
        try:
            with self._locked(), _as_server_down():
                while self._pubsub is not None and self._drain_one(self._pubsub, 0):
                    pass
            super().on_wait_for_pending(result, **options)
        except ResultsServerDown:
            with self._locked():
                self._reconnect()


class ResultBackend(RedisBackend):  # type: ignore[misc]  # Celery is untyped
    """The clients' ``result_backend``: Celery's own for Redis, with a :class:`PatientConsumer`."""

    ResultConsumer = PatientConsumer

    def get(self, key: Any) -> Any:
        """Return what is stored under ``key``.

        Raises:
            ResultsServerDown: the server does not answer.
        """
        with _as_server_down():
            return super().get(key)

    def mget(self, names: Any) -> Any:
        """Return what is stored under each of ``names``.

        Raises:
            ResultsServerDown: the server does not answer.
        """
        with _as_server_down():
            return super().mget(names)

    def on_task_call(self, producer: Any, task_id: str) -> None:
        """Subscribe to the result of a call that is about to be sent.

        Raises:
            redis.ConnectionError, redis.TimeoutError: the server does not answer, after retries.
        """
        super().on_task_call(producer, task_id)
        self.ensure(self.result_consumer.resubscribe, ())


class EmbedResult(AsyncResult):  # type: ignore[misc]  # Celery is untyped
    """Celery's result, except that it waits through outages of the server.

    Of a record that does not decode it raises this package's error, in place of kombu's.
    """

    def get(self, *args: Any, **options: Any) -> Any:
        """Wait for the vectors; see :meth:`sutra_tasks.client.embed_task.EmbedTask.delay`.

        While the server is down this waits, and reads the vectors when the server is up again. A server
        that neither answers nor refuses is noticed after ``SUTRA_SOCKET_TIMEOUT_S``, also if ``timeout``
        is shorter.

        Raises:
            SutraError: the task failed, or its record is corrupt or of another version.
            celery.exceptions.TimeoutError: no result came within ``timeout`` seconds.
        """
        try:
            return super().get(*args, **options)
        except DecodeError as error:
            if isinstance(error.__cause__ or error.__context__, SutraError):
                raise (error.__cause__ or error.__context__) from None
            raise

    def _maybe_reraise_parent_error(self) -> None:
        with suppress(ResultsServerDown):  # Celery calls this again at each interval of the wait
            super()._maybe_reraise_parent_error()
