"""The task ``embed``: clients check and send its calls, and device workers answer them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Final, NoReturn, cast

import redis
from celery import Task
from celery.utils import uuid
from kombu.exceptions import EncodeError, OperationalError

from sutra_tasks import keys
from sutra_tasks.app import app
from sutra_tasks.client.admission import Admission
from sutra_tasks.client.call import HEADER, Call, check_strategy, demand_of
from sutra_tasks.client.options import check_callbacks, check_options, refuse_mapped
from sutra_tasks.errors import (
    BrokerNotConfiguredError,
    InvalidInputError,
    SutraError,
    UnsupportedVersionError,
)
from sutra_tasks.server_check import as_own_error
from sutra_tasks.settings import settings

if TYPE_CHECKING:
    from celery.canvas import Signature
    from numpy.typing import NDArray

    from sutra_tasks.client.results import EmbedResult
    from sutra_tasks.vectors import Embeddings, Vectors

    Server = Callable[[Call], Vectors | Embeddings]

__all__ = ["EmbedTask", "embed", "serve"]

_CANVAS_OPTIONS: Final = {"group_id", "chord", "parent_id", "root_id"}
"""Options that Celery gives to the calls of a group, chord or chain. Admission does not refuse such
calls, because some calls of the group would then be sent and others not."""

_admission = cache(Admission)


@app.on_after_fork.connect(weak=False)  # type: ignore[untyped-decorator]  # Celery is untyped
def _forget_admission(**_: Any) -> None:
    """Have a forked child read the backlog over a connection of its own."""
    if _admission.cache_info().currsize:
        _admission(settings()).abandon()
        _admission.cache_clear()


_server: Server | None = None


def serve(server: Server | None) -> Server | None:
    """Have ``server`` answer the calls that run in this process, and return the server before it."""
    global _server
    before, _server = _server, server
    return before


class EmbedTask(Task):  # type: ignore[misc]  # Celery is untyped
    """Checks a call in the process that makes it, so that bad input is never sent."""

    def delay(self, texts: str | Sequence[str] | NDArray[Any], **options: Any) -> EmbedResult:
        """Send texts to the fleet.

        Args:
            texts: one text, or a list, tuple or array of texts, each of any length; an empty list gives
                shape (0, dim).
            **options: ``prompt`` (name of one of the model's prompts; "" is none; by default the model's
                default prompt), ``dimensions`` (Matryoshka width), ``normalize`` (default True; a long
                text's vector is then the weighted mean of its chunks' unit vectors if False),
                ``details`` (default False) and with it ``chunk_vectors`` (default False);
                ``truncate`` (default False) to cut texts at the model's window,
                ``aggregation_method`` (default ``SUTRA_AGGREGATION_METHOD``) for how the vectors of a
                long text's chunks become one; ``model``, one of the models the fleet may serve
                (default ``SUTRA_MODEL``; of the registry ``name``, or ``name@3``), and ``space`` to
                have vectors of that embedding space or an error.

        Returns:
            A Celery result; its ``get()`` gives a float32 array of shape (dim,) for one text and
            (n, dim) for a list, or :class:`~sutra_tasks.Embeddings` with ``details=True``.

        Raises:
            InvalidInputError: the call can never succeed; nothing was sent.
            BrokerNotConfiguredError: ``SUTRA_BROKER_URL`` is not set.
            ServerUnavailableError: the server did not answer for some 20 seconds, or refuses for now,
                because it is full, say, or a replica; nothing was sent.
            MissingRightsError: the server's user may not send calls; nothing was sent.
            FleetSaturated: more work waits than the fleet can do in ``SUTRA_MAX_QUEUE_S``; nothing was
                sent.
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
            InvalidOptionError: the fleet cannot follow an option; it says what to write instead.
            CallbackQueueError: a callback of another Celery app names no queue.
            FleetSaturated: more work waits than the fleet can do in ``SUTRA_MAX_QUEUE_S``; never raised
                for the calls of a group, chord or chain.
        """
        limits, given = settings(), kwargs or {}
        if self._goes_on_from_a_worker(options):
            return self._send_on(args or (), given, options, strategy)
        if isinstance(args, str | bytes) or not isinstance(given, Mapping):
            raise InvalidInputError("apply_async takes tuple and dict: apply_async((texts,), {...})")
        call = Call.of(args or (), given, limits)
        if strategy is not None:
            check_strategy(strategy)
        check_options({**self._get_exec_options(), **options})
        if limits.broker_url is None and not self.app.conf.task_always_eager:
            raise BrokerNotConfiguredError
        check_callbacks(options, limits)
        if not (_CANVAS_OPTIONS & options.keys() or self.app.conf.task_always_eager):
            _admission(limits).admit(call.tokens)
        try:
            return self._send(call, given, options, strategy)
        except (OperationalError, redis.RedisError) as error:
            raise as_own_error(error, limits, "client") from error
        except EncodeError as error:
            # Only callbacks are left: texts, arguments and headers were checked.
            raise InvalidInputError(
                f"a callback has an argument without a JSON form ({error})"
            ) from None

    def _send(
        self, call: Call, given: Mapping[str, Any], options: dict[str, Any], strategy: str | None
    ) -> EmbedResult:
        headers = dict(options.pop("headers", None) or {})
        headers[HEADER] = call.header(sent_at=time.time(), strategy=strategy)
        # Celery's default is the repr of all texts, which is slow, and shows them in logs and Flower.
        options["argsrepr"] = f"(<{len(call.texts)} texts, {call.bytes} bytes>,)"
        texts = call.texts[0] if call.single else list(call.texts)
        by_name = {name: value for name, value in given.items() if name != "texts"}
        task_id = options["task_id"] = options.get("task_id") or uuid()
        try:
            sent: EmbedResult = super().apply_async((texts,), by_name, headers=headers, **options)
        except Exception:
            # Celery subscribed to the result before it sent the call.
            if (consumer := getattr(self.backend, "result_consumer", None)) is not None:
                consumer.cancel_for(task_id)
            raise
        return sent

    def _goes_on_from_a_worker(self, options: Mapping[str, Any]) -> bool:
        """Return whether a worker of this package sends the next call of a chain, chord or callback."""
        is_worker = "incarnation" in self.app.conf.broker_transport_options
        return is_worker and bool((_CANVAS_OPTIONS | {"task_id"}) & options.keys())

    def _send_on(
        self,
        args: Sequence[Any],
        given: Mapping[str, Any],
        options: dict[str, Any],
        strategy: str | None,
    ) -> EmbedResult:
        """Send a call whatever it holds: the device that takes it tells its caller what is wrong.

        An error here would tell nobody who waits for this call, because it belongs to another task.
        """
        try:
            return self._send(Call.of(args, given, settings()), given, options, strategy)
        except InvalidInputError:
            options["argsrepr"] = "(...)"
            sent: EmbedResult = super().apply_async(args, dict(given), **options)
            return sent

    def map(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse what no worker could do.

        Raises:
            InvalidInputError: always; it says what to write instead.
        """
        raise refuse_mapped("map")

    def starmap(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse what no worker could do; see :meth:`map`."""
        raise refuse_mapped("starmap")

    def chunks(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse what no worker could do; see :meth:`map`."""
        raise refuse_mapped("chunks")

    def signature(self, args: Sequence[Any] | None = None, *more: Any, **options: Any) -> Signature:
        """Return a signature that names the fleet's queue, so that workers of any app can send it."""
        made = super().signature(args, *more, **options)
        made.options.setdefault("queue", keys.EMBED_QUEUE)
        return made

    subtask = signature


@app.task(  # type: ignore[untyped-decorator]  # Celery is untyped
    name=keys.EMBED_TASK,
    base=EmbedTask,
    bind=True,
    shared=False,
    acks_late=True,
    # The caller's mistakes: the worker logs no traceback.
    throws=(InvalidInputError, UnsupportedVersionError),
)
def _embed(self: EmbedTask, /, *args: Any, **options: Any) -> Vectors | Embeddings:
    if _server is None:
        raise SutraError(
            "embed runs on a device worker. Call embed.delay(texts).get(), or use "
            "sutra_tasks.testing.local_fleet() where there is none."
        )
    demand_of(self.request.get(HEADER), 0)  # raises if another version of this package wrote the header
    return _server(Call.of(args, options, settings()))


embed = cast("EmbedTask", _embed)
