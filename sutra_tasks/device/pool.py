"""The Celery adapter of a device worker: threads for its tasks, around the device's runtime.

A pool has the right life for a model: Celery starts it before the consumer, so the model is warm when
work arrives; keeps it over reconnects; and stops it after the consumer. Threads rather than processes:
CUDA does not survive a fork, and every child would hold a copy of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from celery.concurrency.thread import ApplyResult
from celery.concurrency.thread import TaskPool as ThreadPool

from sutra_tasks.broker.late_ack import run_task
from sutra_tasks.device.runtime import DeviceRuntime
from sutra_tasks.settings import settings

__all__ = ["DevicePool"]


class DevicePool(ThreadPool):  # type: ignore[misc]  # Celery is untyped
    """Celery's thread pool with a device in it; ``worker_pool`` of a device worker.

    Attributes:
        runtime: the device.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        incarnation = self.app.conf.broker_transport_options["incarnation"]
        self.runtime = DeviceRuntime(settings(), incarnation)

    def on_start(self) -> None:
        """Load and warm the model; the worker accepts no work before this returns."""
        self.runtime.start()

    def on_apply(
        self,
        target: Callable[..., Any],
        args: Any = None,
        kwargs: Any = None,
        callback: Any = None,
        accept_callback: Any = None,
        **_: Any,
    ) -> ApplyResult:
        """Run one task on a thread, and announce its texts to the batcher."""
        batcher, request = self.runtime.batcher, callback.__self__  # a method of Celery's request
        announcement = batcher.announce()
        task = partial(run_task, target, args or (), kwargs or {}, callback, accept_callback)
        future = self.executor.submit(self._run, request, announcement, task)
        # Many tasks submit no texts: they fail before, are cancelled, or spread them over the fleet.
        future.add_done_callback(lambda _: batcher.withdraw(announcement))
        return ApplyResult(future)

    def _run(self, request: Any, announcement: object, task: Callable[[], None]) -> None:
        self.runtime.execution.begin(request, announcement)
        task()

    def on_close(self) -> None:
        """Leave the fleet, and requeue what has not begun."""
        self.runtime.drain()

    def on_stop(self) -> None:
        """Finish what runs. The batcher outlives the threads that wait for it."""
        self.executor.shutdown(cancel_futures=True)
        self.runtime.stop()
        self._state = self.TERMINATE
