"""Results as clients await them: an outage of the results server ends no wait."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any, Final

import redis
from celery._state import get_current_worker_task
from celery.backends.redis import RedisBackend, ResultConsumer
from celery.result import AsyncResult, GroupResult, result_from_tuple
from kombu.exceptions import DecodeError

from sutra_tasks.app import app
from sutra_tasks.connections import TIMEOUT_S, abandon, client_of
from sutra_tasks.errors import SutraError
from sutra_tasks.server_address import ServerAddress
from sutra_tasks.server_check import explain
from sutra_tasks.server_errors import is_denial
from sutra_tasks.settings import settings

__all__ = ["Backend", "EmbedGroupResult", "EmbedResult", "ResultBackend", "ResultsServerDown"]

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

    def abandon(self) -> None:
        """Close, in a forked child, the connection of the parent, and end the reader's greenlet."""
        inherited, self._pubsub = self._pubsub, None
        if inherited is not None and inherited.connection is not None:
            inherited.connection.disconnect()
            inherited.connection = None  # else the garbage collector returns it to the pool
        stopped = getattr(self.drainer, "_stopped", None)
        if stopped is not None:
            stopped.set()


class Backend(RedisBackend):  # type: ignore[misc]  # Celery is untyped
    """Celery's result backend for Redis, on the server of its URL, else of the option ``address``."""

    @property
    def _address(self) -> ServerAddress:
        # The app's own backend has no URL. One that was made with a URL means that server.
        if self.url:
            return ServerAddress.parse(self.url, "SUTRA_RESULT_URL")
        address: ServerAddress = self._transport_options["address"]
        return address

    @cached_property
    def client(self) -> redis.Redis:
        """The client of all commands; Celery repeats them when the connection fails."""
        return client_of(self._address, self._transport_options.get("socket_timeout", TIMEOUT_S))

    def as_uri(self, include_password: bool = False) -> str:
        """Return the address for people, or with its password."""
        address = self._address
        return address.celery_url(with_password=True) if include_password else str(address)


class ResultBackend(Backend):
    """The clients' ``result_backend``, with a :class:`PatientConsumer`."""

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

    def abandon(self) -> None:
        """Close, in a forked child, the connections of the parent; it makes a backend of its own."""
        self.result_consumer.abandon()
        if "client" in self.__dict__:
            abandon(self.client.connection_pool)

    def on_task_call(self, producer: Any, task_id: str) -> None:
        """Subscribe to the result of a call that is about to be sent.

        Raises:
            redis.ConnectionError, redis.TimeoutError: the server does not answer, after retries.
        """
        super().on_task_call(producer, task_id)
        self.ensure(self.result_consumer.resubscribe, ())


class EmbedResult(AsyncResult):  # type: ignore[misc]  # Celery is untyped
    """Celery's result, except that it waits through outages of the server, and in tasks of other apps.

    It can be copied, pickled, and used in a forked process. Of a record that does not decode it raises
    this package's error, in place of kombu's.
    """

    app = app
    __copy__ = None  # copy.copy takes __reduce__, which keeps what has come already

    _other_backend: Any = None

    @property
    def backend(self) -> Any:
        """The app's backend, which is another one than the parent's after a fork, or the one given."""
        return self.app.backend if self._other_backend is None else self._other_backend

    @backend.setter
    def backend(self, given: Any) -> None:
        """Keep a backend that is not the app's."""
        self._other_backend = None if given is self.app.backend else given

    def get(self, *args: Any, **options: Any) -> Any:
        """Wait for the vectors; see :meth:`sutra_tasks.client.embed_task.EmbedTask.delay`.

        While the server is down this waits, and reads the vectors when the server is up again. A server
        that neither answers nor refuses is noticed after ``SUTRA_SOCKET_TIMEOUT_S``, also if ``timeout``
        is shorter.

        Raises:
            SutraError: the task failed, or its record is corrupt or of another version.
            MissingRightsError: the server's user may not read results.
            celery.exceptions.TimeoutError: no result came within ``timeout`` seconds.
            RuntimeError: a worker's own task waits for tasks of the same app, which may never end.
        """
        options.setdefault("disable_sync_subtasks", not _may_wait([self]))
        try:
            return super().get(*args, **options)
        except DecodeError as error:
            if isinstance(error.__cause__ or error.__context__, SutraError):
                raise (error.__cause__ or error.__context__) from None
            raise
        except redis.ResponseError as error:
            if is_denial(error):  # the answer to the subscription comes only here
                raise explain(error, settings(), "client") from error
            raise

    wait = get  # Celery's older name; its own would be the base class's

    def expires_in_s(self) -> float | None:
        """Return the seconds for which the server still keeps the result; None if it has none."""
        left_ms: Any = self.backend.client.pttl(self.backend.get_key_for_task(self.id))
        return left_ms / 1000 if left_ms > 0 else None

    def _maybe_reraise_parent_error(self) -> None:
        with suppress(ResultsServerDown):  # Celery calls this again at each interval of the wait
            super()._maybe_reraise_parent_error()

    def __reduce__(self) -> Any:
        state = {"_cache": self._cache, "_ignored": self._ignored}
        return _result_of, (self.as_tuple(),), state

    def __del__(self) -> None:
        # A process that was forked and calls nothing needs no backend to forget this in.
        self.app.leave_parent()
        if self.app._backend_cache is not None:  # noqa: SLF001 - `backend` would make one
            super().__del__()


class EmbedGroupResult(GroupResult):  # type: ignore[misc]  # Celery is untyped
    """Celery's result of a group, with the abilities of :class:`EmbedResult`."""

    def get(self, *args: Any, **options: Any) -> Any:
        """Wait for the results of all calls; as :meth:`EmbedResult.get`."""
        options.setdefault("disable_sync_subtasks", not _may_wait(self.results))
        return super().get(*args, **options)

    def __reduce__(self) -> Any:
        return _group_of, (self.id, self.results, self.parent)


def _may_wait(results: Iterable[Any]) -> bool:
    """Return whether waiting cannot keep the awaited tasks from running.

    A task of another app may wait for this app's, which run on other workers. Celery would forbid it.
    """
    if getattr(get_current_worker_task(), "app", None) is app:
        return False
    awaited = [one for result in results for one in _with_parents(result)]
    return all(isinstance(one, EmbedResult | EmbedGroupResult) for one in awaited)


def _with_parents(result: Any) -> Iterator[Any]:
    while result is not None:
        yield result
        for one in getattr(result, "results", None) or ():
            yield from _with_parents(one)
        result = result.parent


def _result_of(parts: Any) -> Any:
    return result_from_tuple(parts, app)


def _group_of(group_id: str, results: list[Any], parent: Any) -> Any:
    return app.GroupResult(group_id, results, parent=parent)
