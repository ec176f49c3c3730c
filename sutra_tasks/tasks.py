"""The task ``embed``: its client side, and the seam where a device worker serves it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import TYPE_CHECKING, Any, Final, cast

import redis
from celery import Task
from celery.backends.redis import RedisBackend, ResultConsumer
from celery.result import AsyncResult
from kombu.exceptions import DecodeError, OperationalError

from sutra_tasks import keys
from sutra_tasks.admission import Admission
from sutra_tasks.app import app
from sutra_tasks.calls import HEADER, Call, check_strategy, demand_of
from sutra_tasks.errors import (
    BrokerNotConfiguredError,
    CallbackQueueError,
    InvalidInputError,
    ServerUnavailableError,
    SutraError,
    UnsupportedVersionError,
)
from sutra_tasks.settings import settings

if TYPE_CHECKING:
    from celery.canvas import Signature

    from sutra_tasks.vectors import Embeddings, Vectors

    Server = Callable[[Call], Vectors | Embeddings]

__all__ = ["EmbedResult", "EmbedTask", "ResultBackend", "embed", "serve"]

logger = logging.getLogger(__name__)

LOOK_S: Final = 0.2
"""Seconds between two looks for a server that is away."""

_SENT_BY_CELERY: Final = {"group_id", "chord", "parent_id", "root_id"}
"""Options of calls that are part of something larger, which must not be sent by halves."""

_admission = cache(Admission)

_server: Server | None = None


def serve(server: Server | None) -> Server | None:
    """Let ``server`` answer the calls of ``embed`` that run in this process; return the one before."""
    global _server
    before, _server = _server, server
    return before


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

    _away = _told = False

    def _reconnect(self) -> None:
        # Not now: we may be inside a garbage collection, and hold the lock that others wait for.
        self._pubsub, self._away = None, True

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
        """Read what is stored already; when the server is away, :meth:`come_back` will."""
        try:
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


app.loader.override_backends = dict.fromkeys(("redis", "rediss"), f"{__name__}:ResultBackend")


class EmbedResult(AsyncResult):  # type: ignore[misc]  # Celery is untyped
    """Celery's result, but patient, and a record that does not decode raises our own error for it."""

    def get(self, *args: Any, **options: Any) -> Any:
        """Wait for the vectors; see :meth:`EmbedTask.delay`.

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


class EmbedTask(Task):  # type: ignore[misc]  # Celery is untyped
    """Checks a call where it is made, so that bad input never travels."""

    def delay(self, texts: str | Sequence[str], **options: Any) -> EmbedResult:
        """Send texts to the fleet.

        Args:
            texts: one text, or a list of texts; an empty list gives shape (0, dim).
            **options: ``prompt`` (name of one of the model's prompts), ``dimensions`` (Matryoshka
                width), ``normalize`` (default True) and ``details`` (default False).

        Returns:
            A Celery result; its ``get()`` gives a float32 array of shape (dim,) for one text and
            (n, dim) for a list, or :class:`~sutra_tasks.Embeddings` with ``details=True``.

        Raises:
            InvalidInputError: the call can never succeed; nothing was sent.
            BrokerNotConfiguredError: ``SUTRA_BROKER_URL`` is not set.
            ServerUnavailableError: the server did not answer for some 20 seconds; nothing was sent.
            FleetSaturated: more waits than may (``SUTRA_MAX_QUEUE_S``); nothing was sent.
        """
        return self.apply_async((texts,), options)

    def apply_async(
        self,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        *,
        strategy: str | None = None,
        **options: Any,
    ) -> EmbedResult:
        """Send texts with Celery's own options; see :meth:`delay` for the arguments and errors.

        Raises:
            CallbackQueueError: a callback of another Celery app names no queue.
            FleetSaturated: more waits than may (``SUTRA_MAX_QUEUE_S``); not for parts of a group, chord
                or chain, of which some would be sent and others not.
        """
        limits, given = settings(), kwargs or {}
        call = Call.of(args or (), given, limits)
        if strategy is not None:
            check_strategy(strategy)
        if limits.broker_url is None and not self.app.conf.task_always_eager:
            raise BrokerNotConfiguredError
        for option in ("link", "link_error", "chain", "chord"):
            for task in _callbacks_without_queue(options.get(option)):
                raise CallbackQueueError(task, option)
        if not (_SENT_BY_CELERY & options.keys() or self.app.conf.task_always_eager):
            _admission(limits).admit(call.tokens)
        headers = dict(options.pop("headers", None) or {})
        headers[HEADER] = call.header(sent_at=time.time(), strategy=strategy)
        # Celery would otherwise print the texts, slowly, into logs and Flower.
        options["argsrepr"] = f"(<{len(call.texts)} texts, {call.bytes} bytes>,)"
        texts = call.texts[0] if call.single else list(call.texts)
        by_name = {name: value for name, value in given.items() if name != "texts"}
        try:
            sent: EmbedResult = super().apply_async((texts,), by_name, headers=headers, **options)
        except (OperationalError, redis.ConnectionError, redis.TimeoutError) as error:
            raise ServerUnavailableError(type(error.__cause__ or error).__name__) from error
        return sent

    def signature(self, args: Sequence[Any] | None = None, *more: Any, **options: Any) -> Signature:
        """Return a signature that names the fleet's queue, so any app's worker can send it on."""
        made = super().signature(args, *more, **options)
        made.options.setdefault("queue", keys.EMBED_QUEUE)
        return made

    subtask = signature


def _callbacks_without_queue(callbacks: Any) -> Iterator[str]:
    """Yield the names of other apps' tasks in ``callbacks`` that say no queue."""
    if callbacks is None:
        return
    for signature in callbacks if isinstance(callbacks, list | tuple) else [callbacks]:
        task = signature["task"]
        if task.startswith("celery."):  # chain, group, chord and the like hold others
            inner = signature.get("kwargs") or {}
            for name in ("tasks", "task", "header", "body"):
                yield from _callbacks_without_queue(inner.get(name))
        elif not task.startswith(keys.OWN_TASK_PREFIX):
            options = signature.get("options") or {}
            if not options.get("queue") and not options.get("exchange"):
                yield task


@app.task(  # type: ignore[untyped-decorator]  # Celery is untyped
    name=keys.EMBED_TASK,
    base=EmbedTask,
    bind=True,
    shared=False,
    acks_late=True,
    throws=(InvalidInputError, UnsupportedVersionError),  # told to the caller, not a fault here
)
def _embed(self: EmbedTask, texts: str | list[str], **options: Any) -> Vectors | Embeddings:
    if _server is None:
        raise SutraError(
            "embed runs on a device worker. Call embed.delay(texts).get(), or use "
            "sutra_tasks.testing.local_fleet() where there is none."
        )
    demand_of(self.request.get(HEADER), 0)  # refuses a version this worker does not know
    return _server(Call.of((texts,), options, settings()))


embed = cast("EmbedTask", _embed)
