"""The distill worker: one run at a time, which can be followed, paused, cancelled and killed.

The run's message stays in flight until the run ends, so no other worker gets it while this process
lives. If the process dies, the message is requeued, and the run continues at its last checkpoint.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from celery.exceptions import Ignore, Reject, TimeoutError  # noqa: A004 - what results raise
from celery.result import allow_join_result
from celery.utils.log import get_logger
from celery.worker.state import revoked

from sutra_tasks.broker.late_ack import LateAckPool
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
"""Seconds that the fleet may take for a block of the teacher's vectors; then they are computed here."""


class DistillPool(LateAckPool):
    """Celery's thread pool with one thread; stops a run between two steps when the worker stops."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._options = settings()
        self._client = broker_client(self._options)
        self._incarnation: str = self.app.conf.broker_transport_options["incarnation"]
        self._stopping = threading.Event()
        self._request: Any = None

    def on_start(self) -> None:
        """Serve the task ``distill`` in this process."""
        serve(self._run)

    def on_close(self) -> None:
        """Stop the current run at its next step; its message is requeued."""
        self._stopping.set()

    def on_stop(self) -> None:
        """Wait until the current run has stopped."""
        self._stopping.set()
        super().on_stop()

    def submit(self, request: Any, task: Callable[[], None]) -> Future[None]:
        """Run one task on the thread."""
        future: Future[None] = self.executor.submit(self._task, request, task)
        return future

    def _task(self, request: Any, task: Callable[[], None]) -> None:
        self._request = request
        task()

    def _run(self, config: DistillationConfig) -> dict[str, Any]:
        options, task_id = _with_threads(self._options), self._request.id
        registry = open_registry(options)
        if registry is None:
            raise SettingsError("SUTRA_MODELS_DIR", "", "not set: the folder that gets the student")
        lock = RunLock(self._client, model_name(config), task_id, self._incarnation)
        monitor = RunMonitor(self._client, options, self._request, self._stopping, check_lock=lock.check)
        sample = RunSample(runs_folder(options), task_id, options.sample_retention_s)
        try:
            monitor.end_if_asked()
            with lock:
                result = self._made(config, options, registry, monitor, sample)
        except WorkerStopping:
            raise Reject("the worker is stopping", requeue=True) from None
        except RunCancelled:
            sample.delete()
            revoked.add(task_id)  # Celery looks there, and does not know the mark on the server
            self._request.revoked()  # stores the state REVOKED for the caller
            raise Ignore from None
        except Exception:
            sample.delete()
            raise
        sample.delete()
        return result

    def _made(
        self,
        config: DistillationConfig,
        options: Settings,
        registry: ModelRegistry,
        monitor: RunMonitor,
        run_sample: RunSample,
    ) -> dict[str, Any]:
        """Return the result of an earlier, equal run, or of this one."""
        with limit_preparation(config, options):
            sample = open_sample(self._client, options) if config.sample else None
            sampled = run_sample.texts(sample.texts) if sample is not None else ()
            run = DistillationRun(
                config,
                read_run_texts(config, options, sampled),
                options,
                registry,
                report=monitor.report,
                by_fleet=self._by_fleet(config.teacher),
            )
        if (earlier := run.earlier_result()) is None:
            return run.make()
        logger.info("%s was made of the same recipe and texts: nothing to do", earlier["model"])
        return earlier

    def _by_fleet(self, teacher: str) -> Callable[[Sequence[str], str], Iterator[Floats]] | None:
        """Return a function that has the fleet embed texts; None if no live device has the teacher."""
        ttl_s = self._options.device_ttl_s
        has_teacher = any(
            one.record is not None
            and one.is_live(ttl_s)
            and one.takes_work
            and teacher in one.record.models
            for one in fleet_members(self._client)
        )
        if not has_teacher:
            return None

        def embedded(texts: Sequence[str], space: str) -> Iterator[Floats]:
            # Celery forbids tasks to wait for tasks. Here it cannot deadlock: no device waits for this.
            with allow_join_result():
                try:
                    yield from embed_many(
                        texts, model=teacher, space=space, truncate=True, timeout_s=FLEET_S
                    )
                except TimeoutError:
                    raise SutraError(f"it gave none for {FLEET_S:.0f} s") from None

        return embedded


def _with_threads(options: Settings) -> Settings:
    """Set the number of torch's threads, for training and for engines that the run loads.

    The number decides the last bits of the weights, so it must not depend on what was loaded before.
    """
    import torch  # noqa: PLC0415 - takes seconds to import, and a worker without a run needs none

    threads = options.distill_threads or count_cores()
    torch.set_num_threads(threads)
    return replace(options, torch_threads=threads)
