"""The Celery adapter of a device worker: threads for its tasks, around the device's runtime.

A pool has the right life for a model: Celery starts it before the consumer, so the model is warm when
work arrives; keeps it over reconnects; and stops it after the consumer. Threads rather than processes:
CUDA does not survive a fork, and every child would hold a copy of the model.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import redis
from celery.exceptions import WorkerShutdown
from celery.utils.log import get_logger
from celery.worker import state as worker_state

from sutra_tasks.broker.late_ack import LateAckPool
from sutra_tasks.device.runtime import DeviceRuntime
from sutra_tasks.errors import SutraError
from sutra_tasks.extras import how_to_install
from sutra_tasks.membership.unstarted import end_unstarted
from sutra_tasks.server_errors import is_permanent
from sutra_tasks.settings import settings

__all__ = ["DevicePool"]

logger = get_logger(__name__)


class DevicePool(LateAckPool):
    """Celery's thread pool with a device in it; ``worker_pool`` of a device worker.

    Attributes:
        runtime: the device.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        incarnation = self.app.conf.broker_transport_options["incarnation"]
        with _failures_told(lambda: None):
            self.runtime = DeviceRuntime(settings(), incarnation)

    def on_start(self) -> None:
        """Load and warm the model; the worker accepts no work before this returns.

        Raises:
            SystemExit: the device cannot start, and has said why; or a signal ended it.
            redis.RedisError: the server does not answer, which may pass.
        """
        with _failures_told(self.runtime.abandon), _ended_at_once():
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


@contextmanager
def _failures_told(abandon: Callable[[], None]) -> Iterator[None]:
    """End the process with a sentence if a block fails for a reason that another try cannot mend."""
    options = settings()
    try:
        yield
    except Exception as error:
        if isinstance(error, redis.RedisError) and not is_permanent(error):
            raise  # the server may be back in a moment
        logger.debug("the device cannot start", exc_info=True)
        abandon()
        end_unstarted(options, str(options.device_id), _reason(error, options.torch_device))
    except SystemExit:
        abandon()
        raise


@contextmanager
def _ended_at_once() -> Iterator[None]:
    """Have SIGTERM and SIGINT end the worker within a block.

    Celery's own handlers only note a signal until the consumer runs, and a model may load for minutes.
    """

    def end(signum: int, frame: Any) -> None:  # noqa: ARG001 - a signal handler's shape
        # Python drops an error that is raised while an object is deleted: Celery's loop looks here.
        worker_state.should_stop = 0
        raise WorkerShutdown(0)

    before = {one: signal.signal(one, end) for one in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _reason(error: Exception, torch_device: str) -> str:
    """Return why a device cannot start, in one sentence."""
    if isinstance(error, ModuleNotFoundError) and (needed := how_to_install(error)) is not None:
        return needed
    first_line = next(iter(str(error).splitlines()), "")
    reason = f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__
    if isinstance(error, SutraError):
        reason = str(error)
    if torch_device.startswith("cuda"):
        reason += (
            f" Its device is {torch_device}: does nvidia-smi show it, and is torch a build for CUDA? "
            "SUTRA_TORCH_DEVICE=cpu does without"
        )
    return reason
