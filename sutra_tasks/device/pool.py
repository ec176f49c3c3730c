"""The Celery adapter of a device worker: threads for its tasks, around the device's runtime.

A pool has the right life for a model: Celery starts it before the consumer, so the model is warm when
work arrives; keeps it over reconnects; and stops it after the consumer. Threads rather than processes:
CUDA does not survive a fork, and every child would hold a copy of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from sutra_tasks.broker.late_ack import LateAckPool
from sutra_tasks.device.runtime import DeviceRuntime
from sutra_tasks.settings import settings

__all__ = ["DevicePool"]


class DevicePool(LateAckPool):
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

    def submit(self, request: Any, task: Callable[[], None]) -> Future[None]:
        """Run one task on a thread, and announce its texts to the batcher."""
        batcher = self.runtime.batcher
        announcement = batcher.announce()
        future: Future[None] = self.executor.submit(self._run, request, announcement, task)
        # Many tasks submit no texts: they fail before, are cancelled, or spread them over the fleet.
        future.add_done_callback(lambda _: batcher.withdraw(announcement))
        return future

    def _run(self, request: Any, announcement: object, task: Callable[[], None]) -> None:
        self.runtime.execution.begin(request, announcement)
        task()

    def on_close(self) -> None:
        """Leave the fleet, and requeue what has not begun."""
        self.runtime.drain()

    def on_stop(self) -> None:
        """Finish what runs. The batcher outlives the threads that wait for it."""
        super().on_stop()
        self.runtime.stop()
