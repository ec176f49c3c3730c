"""Reports the progress of a run, pauses it while the fleet is saturated, and ends it when asked to."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import redis
from celery.utils.log import get_logger
from celery.worker.state import revoked

from sutra_tasks import keys
from sutra_tasks.broker.result_backend import LeaseEnded
from sutra_tasks.client.admission import Backlog

if TYPE_CHECKING:
    from sutra_tasks.settings import Settings

__all__ = ["RunCancelled", "RunMonitor", "WorkerStopping", "should_pause"]

logger = get_logger(__name__)

REPORT_S: Final = 1.0
"""Seconds between two reports of the same phase."""
CHECK_S: Final = 0.5
"""Seconds between two reads of the backlog, and of the mark of cancelled runs."""
RESUME_SHARE: Final = 0.5
"""Share of the threshold at which a paused run continues, so that it does not flap."""


class WorkerStopping(Exception):  # noqa: N818 - not an error: the run continues where it is delivered next
    """The worker is to stop, or has lost its lease."""


class RunCancelled(Exception):  # noqa: N818 - not an error: the caller asked for it
    """The run's caller cancelled it."""


def should_pause(backlog: Backlog | None, threshold_s: float, *, is_paused: bool) -> bool:
    """Return whether a run should pause, or stay paused, because the fleet has too much work.

    Args:
        backlog: what waits in the fleet; None if no router has reported lately.
        threshold_s: ``SUTRA_DISTILL_PAUSE_S``; 0: never pause.
        is_paused: whether the run is paused now.
    """
    if not threshold_s or backlog is None or not backlog.tokens_per_s:
        return False
    waiting_s = backlog.tokens / backlog.tokens_per_s
    return waiting_s >= threshold_s * (RESUME_SHARE if is_paused else 1.0)


class RunMonitor:
    """Connects one run to its caller, its worker and the fleet."""

    def __init__(
        self,
        client: redis.Redis,
        options: Settings,
        request: Any,
        stopping: threading.Event,
        *,
        check_lock: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Create the monitor of a run.

        Args:
            client: of the server with the queues.
            options: the deployment's settings.
            request: Celery's request of the run.
            stopping: set when the worker is to stop.
            check_lock: raises an error if the run has lost its lock.
            clock: gives seconds that only grow.
        """
        self._client, self._request, self._stopping = client, request, stopping
        self._check_lock, self._clock = check_lock, clock
        self._pause_s = options.distill_pause_s
        self._reported_at = self._backlog_at = self._mark_at = -float("inf")
        self._phase: Any = None

    def report(self, progress: Mapping[str, Any]) -> None:
        """See :class:`~sutra_tasks.distillation.worker.run.Report`."""
        self.end_if_asked()
        self._report_if_due(progress)
        if self._clock() - self._backlog_at >= CHECK_S:
            self._backlog_at = self._clock()
            if progress.get("by") != "the fleet":  # else the backlog is this run's own texts
                self._pause(progress)

    def end_if_asked(self) -> None:
        """Raise an exception if the run has to end.

        Raises:
            WorkerStopping: the worker is to stop, or another process runs this task.
            RunCancelled: the caller cancelled the run.
            DistillationUnderWayError: another task has the lock.
        """
        if self._stopping.is_set():
            raise WorkerStopping
        try:
            self._check_lock()
        except LeaseEnded:
            raise WorkerStopping from None
        if self._request.id in revoked or self._is_marked():
            raise RunCancelled

    def _is_marked(self) -> bool:
        """Read the mark of cancelled runs: a worker that was down does not hear of a ``revoke()``."""
        if self._clock() - self._mark_at < CHECK_S:
            return False
        self._mark_at = self._clock()
        try:
            return bool(self._client.exists(keys.cancelled(self._request.id)))
        except redis.RedisError:
            return False

    def _pause(self, progress: Mapping[str, Any]) -> None:
        is_paused = False
        while should_pause(self._backlog(), self._pause_s, is_paused=is_paused):
            if not is_paused:
                logger.info("paused: the fleet is saturated")
                is_paused = True
            self._report_if_due({**progress, "phase": "paused"})
            self._stopping.wait(CHECK_S)
            self.end_if_asked()
        if is_paused:
            logger.info("going on")

    def _backlog(self) -> Backlog | None:
        try:
            return Backlog.from_json(self._client.get(keys.backlog()))
        except redis.RedisError:
            return None

    def _report_if_due(self, progress: Mapping[str, Any]) -> None:
        phase = progress.get("phase")
        if self._clock() - self._reported_at >= REPORT_S or phase != self._phase:
            self._reported_at, self._phase = self._clock(), phase
            self._store(progress)

    def _store(self, progress: Mapping[str, Any]) -> None:
        request = self._request
        try:
            request.task.backend.store_result(request.id, dict(progress), "PROGRESS")
        except LeaseEnded:
            raise WorkerStopping from None
        except Exception as error:  # noqa: BLE001 - a run continues without progress reports
            logger.warning("the progress of task %s is not told: %s", request.id, error)
        shown = ", ".join(f"{name} {_short(value)}" for name, value in progress.items())
        request.send_event("task-progress", result=shown)  # Flower shows it as state and result


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
