"""Waiting for vectors, also while the server that keeps them is away."""

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

__all__ = ["EmbedResult", "ResultBackend", "ServerAway"]

logger = logging.getLogger(__name__)

LOOK_S: Final = 0.2
"""Seconds between two looks for a server that is away."""


class ServerAway(redis.ConnectionError):
    """The server with the results does not answer, which time may mend.

    A class of its own, for a task may have failed with a ``ConnectionError``, too.
    """


@contextmanager
def _time_may_mend() -> Iterator[None]:
    try:
        yield
    except redis.AuthenticationError:
        raise  # waiting does not change a password
    except (redis.ConnectionError, redis.TimeoutError) as error:
        raise ServerAway(*error.args) from error


class PatientConsumer(ResultConsumer):  # type: ignore[misc]  # Celery is untyped
    """Celery's reader of results, but an outage ends no wait: only the caller's timeout does."""

    _pubsub: Any
    _away = _told = False

    def _reconnect(self) -> None:
        # Not now: we may be inside a garbage collection, and hold the lock that others wait for.
        lost, self._pubsub, self._away = self._pubsub, None, True
        if lost is not None and lost.connection is not None:
            lost.connection.disconnect()

    def come_back(self) -> None:
        """After an outage, subscribe anew and read what was stored meanwhile.

        Raises:
            redis.ConnectionError, redis.TimeoutError: it goes on.
        """
        with self._locked():
            if not self._away:
                return
            client = self.backend.client
            self._pubsub = pubsub = client.pubsub(ignore_subscribe_messages=True)
            if names := list(self.subscribed_to):
                # In the other order, what is stored between the two would be missed.
                pubsub.subscribe(*names)
                for stored in filter(None, client.mget(names)):
                    self.on_state_change(self._decode_result(stored), None)
            self._away = self._told = False

    def drain_events(self, timeout: float | None = None) -> None:
        """Take in the results that arrive within ``timeout``, or look whether the server is back."""
        try:
            with _time_may_mend():
                self.come_back()
        except ServerAway as error:
            if not self._told:
                logger.warning("waiting for the server with the results: %s", error)
                self._told = True
            time.sleep(LOOK_S)
        else:
            super().drain_events(timeout)

    def on_wait_for_pending(self, result: Any, **options: Any) -> None:
        """Read what is stored already; when the server is away, :meth:`come_back` will.

        What was published meanwhile is taken in first: it need not be fetched, and decoded, again.
        """
        try:
            with self._locked(), _time_may_mend():
                while self._pubsub is not None and self._drain_one(self._pubsub, 0):
                    pass
            super().on_wait_for_pending(result, **options)
        except ServerAway:
            with self._locked():
                self._reconnect()


class ResultBackend(RedisBackend):  # type: ignore[misc]  # Celery is untyped
    """The clients' ``result_backend``: Celery's own for Redis, with a :class:`PatientConsumer`."""

    ResultConsumer = PatientConsumer

    def get(self, key: Any) -> Any:
        """Return what is stored under ``key``.

        Raises:
            ServerAway: nobody knows.
        """
        with _time_may_mend():
            return super().get(key)

    def mget(self, names: Any) -> Any:
        """Return what is stored under each of ``names``.

        Raises:
            ServerAway: nobody knows.
        """
        with _time_may_mend():
            return super().mget(names)

    def on_task_call(self, producer: Any, task_id: str) -> None:
        """Await a result that is about to be asked for.

        Raises:
            redis.ConnectionError, redis.TimeoutError: it could not be read, not after retries either.
        """
        super().on_task_call(producer, task_id)
        self.ensure(self.result_consumer.come_back, ())


class EmbedResult(AsyncResult):  # type: ignore[misc]  # Celery is untyped
    """Celery's result, but patient, and a record that does not decode raises our own error for it."""

    def get(self, *args: Any, **options: Any) -> Any:
        """Wait for the vectors; see :meth:`sutra_tasks.client.embed_task.EmbedTask.delay`.

        While the server is away this waits on, and takes the vectors once it is back. A server that
        neither answers nor refuses is noticed after ``SUTRA_SOCKET_TIMEOUT_S``, however short the
        timeout.

        Raises:
            SutraError: the task failed, or its record is corrupt or of another version.
            celery.exceptions.TimeoutError: nothing came within ``timeout`` seconds.
        """
        try:
            return super().get(*args, **options)
        except DecodeError as error:
            if isinstance(error.__cause__ or error.__context__, SutraError):
                raise (error.__cause__ or error.__context__) from None
            raise

    def _maybe_reraise_parent_error(self) -> None:
        with suppress(ServerAway):  # Celery asks again at every interval of a wait
            super()._maybe_reraise_parent_error()
