"""The task ``distill``: its client side, and the hook by which a distill worker runs it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import redis
from celery import Task
from kombu.exceptions import OperationalError

from sutra_tasks import keys
from sutra_tasks.app import app
from sutra_tasks.client.options import check_callbacks, check_message
from sutra_tasks.distillation.config import DistillationConfig
from sutra_tasks.errors import (
    BrokerNotConfiguredError,
    DistillationUnderWayError,
    InvalidInputError,
    SettingsError,
    SutraError,
    UnsupportedVersionError,
)
from sutra_tasks.server_check import as_own_error
from sutra_tasks.settings import settings

if TYPE_CHECKING:
    from sutra_tasks.client.results import EmbedResult

    Run = Callable[[DistillationConfig], dict[str, Any]]

__all__ = ["DistillTask", "distill", "distill_due", "serve"]

_run: Run | None = None


def serve(run: Run | None) -> Run | None:
    """Set the function that runs distillations in this process; return the previous one."""
    global _run
    before, _run = _run, run
    return before


class DistillTask(Task):  # type: ignore[misc]  # Celery is untyped
    """The client side: checks a recipe before it is sent."""

    def delay(self, config: DistillationConfig) -> EmbedResult:
        """Request a smaller model made of a larger one; it takes minutes to days.

        Args:
            config: the recipe.

        Returns:
            A Celery result, which is kept for a week. While the run lasts, its state is ``PROGRESS`` and
            ``info`` has its progress: ``phase``, ``epoch`` and ``epochs``, ``step`` and ``steps``, the
            losses, ``quality`` and ``left_s``. ``get()`` returns ``model`` (``name@version`` in the
            registry), ``made`` (False if a version of the same recipe and data existed), ``metrics``
            (see :class:`~sutra_tasks.DistillationMetrics`), ``report`` (a file in the version's folder)
            and ``bad_rows``. ``revoke()`` ends the run between two steps. It does not reach workers that
            are down; ``sutra distill --cancel`` does.

        Raises:
            InvalidInputError: the recipe cannot be followed; nothing was sent.
            BrokerNotConfiguredError: ``SUTRA_BROKER_URL`` is not set.
            ServerUnavailableError: the server did not answer; nothing was sent.
        """
        return self.apply_async((config,))

    def apply_async(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> EmbedResult:
        """Send a recipe with Celery's options; see :meth:`delay`.

        Raises:
            InvalidOptionError: an option of Celery's cannot work.
            CallbackQueueError: a callback of another Celery app names no queue.
        """
        given = _only_argument(args, kwargs)
        config = given if isinstance(given, DistillationConfig) else DistillationConfig.from_json(given)
        if settings().broker_url is None and not self.app.conf.task_always_eager:
            raise BrokerNotConfiguredError
        check_message({**self._get_exec_options(), **options})
        check_callbacks(options, settings())
        options["argsrepr"] = f"(<{config.student} student of {config.teacher}>,)"
        options.setdefault("queue", keys.DISTILL_QUEUE)
        try:
            sent: EmbedResult = super().apply_async((config.to_json(),), {}, **options)
        except (OperationalError, redis.RedisError) as error:
            raise as_own_error(error, settings(), "client") from error
        return sent


def _only_argument(args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> Any:
    if len(args) != 1 or kwargs:
        raise InvalidInputError("distill() takes one argument, a DistillationConfig")
    return args[0]


def _required_run() -> Run:
    if _run is None:
        raise SutraError(
            "distill runs on a distill worker. Call distill.delay(config), and start one with "
            "`sutra up` (SUTRA_DATA_DIR and SUTRA_MODELS_DIR set) or celery -A workers.distill worker."
        )
    return _run


@app.task(  # type: ignore[untyped-decorator]  # Celery is untyped
    name=keys.DISTILL_TASK,
    base=DistillTask,
    shared=False,
    acks_late=True,
    throws=(DistillationUnderWayError, InvalidInputError, UnsupportedVersionError),
)
def _distill(*args: Any, **kwargs: Any) -> dict[str, Any]:
    return _required_run()(DistillationConfig.from_json(_only_argument(args, kwargs)))


@app.task(name=keys.DISTILL_DUE_TASK, shared=False, acks_late=True)  # type: ignore[untyped-decorator]
def distill_due() -> dict[str, Any]:
    """Send the scheduled recipe; its run makes nothing if there are no new texts.

    The message of this task expires, so none pile up behind a run of hours. The message that it sends
    does not expire, so the run continues after a worker's death, however long it takes.
    """
    return {"task": distill.delay(scheduled()).id}


def scheduled() -> DistillationConfig:
    """Return the recipe of ``SUTRA_DISTILL_CONFIG``.

    Raises:
        SettingsError: the file cannot be read, or is not a recipe.
    """
    name = settings().distill_config or ""
    try:
        return DistillationConfig.from_json(json.loads(Path(name).read_bytes()))
    except (OSError, ValueError, UnsupportedVersionError) as error:
        raise SettingsError("SUTRA_DISTILL_CONFIG", name, str(error)) from None


distill = cast("DistillTask", _distill)
