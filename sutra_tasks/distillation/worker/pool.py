"""The distill worker: one run at a time, which can be watched, paused, cancelled and killed.

Its message is held like any other until the run has ended, so it is delivered to nobody else while this
process lives; after a death it comes back, and the run goes on at its last checkpoint.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from celery.concurrency.thread import ApplyResult
from celery.concurrency.thread import TaskPool as ThreadPool
from celery.exceptions import Ignore, Reject, TimeoutError  # noqa: A004 - what results raise
from celery.result import allow_join_result
from celery.utils.log import get_logger
from celery.worker.state import revoked

from sutra_tasks.broker.late_ack import run_task
from sutra_tasks.client.embed_many import embed_many
from sutra_tasks.connections import broker_client
from sutra_tasks.distillation.data.run_texts import read_run_texts
from sutra_tasks.distillation.data.traffic_sample import open_sample
from sutra_tasks.distillation.distill_task import serve
from sutra_tasks.distillation.names import model_name, runs_folder
from sutra_tasks.distillation.worker.attempts import limit_preparation
from sutra_tasks.distillation.worker.run import DistillationRun
from sutra_tasks.distillation.worker.run_lock import RunLock
from sutra_tasks.distillation.worker.run_monitor import RunCancelled, RunMonitor, WorkerStopping
from sutra_tasks.distillation.worker.run_sample import RunSample
from sutra_tasks.errors import SettingsError, SutraError
from sutra_tasks.host.hardware import count_cores
from sutra_tasks.membership.fleet import fleet_members
from sutra_tasks.models.registry.resolve import open_registry
from sutra_tasks.settings import settings

if TYPE_CHECKING:
    from sutra_tasks.distillation.config import DistillationConfig
    from sutra_tasks.models.registry.model_registry import ModelRegistry
    from sutra_tasks.settings import Settings
    from sutra_tasks.vectors import Floats

__all__ = ["DistillPool"]

logger = get_logger(__name__)

FLEET_S: Final = 300.0
"""Seconds that the fleet may take for some of the teacher's vectors, until they are computed here."""


class DistillPool(ThreadPool):  # type: ignore[misc]  # Celery is untyped
    """Celery's thread pool, of one thread, whose runs end in good order when the worker does."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._options = settings()
        self._client = broker_client(self._options)
        self._incarnation: str = self.app.conf.broker_transport_options["incarnation"]
        self._stopping = threading.Event()
        self._request: Any = None

    def on_start(self) -> None:
        """Take runs from now on."""
        serve(self._run)

    def on_close(self) -> None:
        """Have the run that is under way stop at its next step; its message goes back."""
        self._stopping.set()

    def on_stop(self) -> None:
        """Wait for it."""
        self._stopping.set()
        self.executor.shutdown(cancel_futures=True)
        self._state = self.TERMINATE

    def on_apply(
        self,
        target: Callable[..., Any],
        args: Any = None,
        kwargs: Any = None,
        callback: Any = None,
        accept_callback: Any = None,
        **_: Any,
    ) -> ApplyResult:
        """Run one task on the thread."""
        return ApplyResult(
            self.executor.submit(self._task, target, args or (), kwargs or {}, callback, accept_callback)
        )

    def _task(self, target: Any, args: Any, kwargs: Any, callback: Any, accept_callback: Any) -> None:
        # The callback is a method of Celery's request.
        self._request = callback.__self__
        run_task(target, args, kwargs, callback, accept_callback)

    def _run(self, config: DistillationConfig) -> dict[str, Any]:
        options, task_id = _with_threads(self._options), self._request.id
        registry = open_registry(options)
        if registry is None:
            raise SettingsError("SUTRA_MODELS_DIR", "", "not set: the folder that gets the student")
        watch = RunMonitor(self._client, options, self._request, self._stopping)
        drawn = RunSample(runs_folder(options), task_id, options.sample_retention_s)
        try:
            watch.end_if_asked()
            with RunLock(self._client, model_name(config), task_id, self._incarnation) as lock:
                watch.check = lock.check
                found = self._made(config, options, registry, watch, drawn)
        except WorkerStopping:
            raise Reject("the worker is stopping", requeue=True) from None
        except RunCancelled:
            drawn.drop()
            revoked.add(task_id)  # Celery asks again, and of a mark on the server it knows nothing
            self._request.revoked()  # says so to its caller
            raise Ignore from None
        except Exception:
            drawn.drop()
            raise
        drawn.drop()
        return found

    def _made(
        self,
        config: DistillationConfig,
        options: Settings,
        registry: ModelRegistry,
        watch: RunMonitor,
        drawn: RunSample,
    ) -> dict[str, Any]:
        with limit_preparation(config, options):
            kept = open_sample(self._client, options) if config.sample else None
            texts = drawn.texts(kept.texts) if kept is not None else ()
            material = read_run_texts(config, options, texts)
            by_fleet = self._by_fleet(config.teacher)
            run = DistillationRun(config, material, options, registry, watch=watch, by_fleet=by_fleet)
        if (found := run.made()) is None:
            return run.make()
        logger.info("%s was made of the same recipe and texts: nothing to do", found["model"])
        return found

    def _by_fleet(self, teacher: str) -> Callable[[Sequence[str], str], Iterator[Floats]] | None:
        """Return how the fleet embeds texts with the teacher, if a live device has it in memory."""
        ttl_s = self._options.device_ttl_s
        able = any(
            one.record is not None
            and one.is_live(ttl_s)
            and one.takes_work
            and teacher in one.record.models
            for one in fleet_members(self._client)
        )
        if not able:
            return None

        def embedded(texts: Sequence[str], space: str) -> Iterator[Floats]:
            # A task must not wait for one of its own queue; devices never wait for this worker.
            with allow_join_result():
                try:
                    yield from embed_many(
                        texts, model=teacher, space=space, truncate=True, timeout_s=FLEET_S
                    )
                except TimeoutError:
                    raise SutraError(f"it gave none for {FLEET_S:.0f} s") from None

        return embedded


def _with_threads(options: Settings) -> Settings:
    """Have torch use the run's threads, and any engine that the run loads as well.

    The number decides the last bits of what is learned, so it may not depend on what was loaded before.
    """
    import torch  # noqa: PLC0415 - seconds to import: only where a run begins

    threads = options.distill_threads or count_cores()
    torch.set_num_threads(threads)
    return replace(options, torch_threads=threads)
