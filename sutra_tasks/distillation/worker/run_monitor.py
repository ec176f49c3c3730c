"""Who looks on while a run runs: tells of it, pauses it while the fleet is saturated, and ends it."""

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

__all__ = ["PausePolicy", "RunCancelled", "RunMonitor", "WorkerStopping"]

logger = get_logger(__name__)

TELL_S: Final = 1.0
LOOK_S: Final = 0.5
RESUME_SHARE: Final = 0.5
"""Share of the pause's threshold under which a run goes on, so that it does not flap."""


class WorkerStopping(Exception):  # noqa: N818 - not an error: the run goes on where it is delivered next
    """The worker is to end, or has lost its lease."""


class RunCancelled(Exception):  # noqa: N818 - not an error: its caller gave it up
    """The run is not wanted any more."""


class PausePolicy:
    """Says when a run should pause: while the fleet has more waiting than it may."""

    def __init__(self, pause_s: float) -> None:
        self._pause_s, self._paused = pause_s, False

    def paused(self, backlog: Backlog | None) -> bool:
        """Say whether to pause now.

        Args:
            backlog: what waits in the fleet; None if no router has said lately.
        """
        if not self._pause_s or backlog is None or not backlog.tokens_per_s:
            self._paused = False
        else:
            waits_s = backlog.tokens / backlog.tokens_per_s
            self._paused = waits_s >= self._pause_s * (RESUME_SHARE if self._paused else 1.0)
        return self._paused


class RunMonitor:
    """Tells of a run, pauses it while the fleet has too much to do, and ends it when that is asked."""

    def __init__(
        self,
        client: redis.Redis,
        options: Settings,
        request: Any,
        stopping: threading.Event,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare.

        Args:
            client: of the server with the queues.
            options: of this deployment.
            request: Celery's, of the run.
            stopping: set when the worker is to end.
            clock: seconds that only grow.
        """
        self._client, self._request, self._stopping = client, request, stopping
        self._pacer, self._clock = PausePolicy(options.distill_pause_s), clock
        self._told_at = self._looked_at = self._asked_at = -float("inf")
        self._phase: Any = None
        self.check: Callable[[], None] = lambda: None
        """Called at each look: raises what ends the run."""

    def __call__(self, progress: Mapping[str, Any]) -> None:
        """See :class:`~sutra_tasks.distillation.worker.run.Watch`."""
        self.end_if_asked()
        self._tell_if_due(progress)
        if self._clock() - self._looked_at >= LOOK_S:
            self._looked_at = self._clock()
            if progress.get("by") != "the fleet":  # what saturates it is then this run
                self._pause(progress)

    def end_if_asked(self) -> None:
        """Raise what the run is to end with, if it is.

        Raises:
            Stopping: the worker is to end, or others do its work by now.
            Cancelled: its caller gave it up.
        """
        if self._stopping.is_set():
            raise WorkerStopping
        try:
            self.check()
        except LeaseEnded:
            raise WorkerStopping from None
        if self._request.id in revoked or self._is_marked():
            raise RunCancelled

    def _is_marked(self) -> bool:
        """Look for a mark on the server: a worker that was not up when it was revoked was not told."""
        if self._clock() - self._asked_at < LOOK_S:
            return False
        self._asked_at = self._clock()
        try:
            return bool(self._client.exists(keys.cancelled(self._request.id)))
        except redis.RedisError:
            return False

    def _pause(self, progress: Mapping[str, Any]) -> None:
        paused = False
        while self._pacer.paused(self._backlog()):
            if not paused:
                logger.info("paused: the fleet is saturated")
                paused = True
            self._tell_if_due({**progress, "phase": "paused"})
            self._stopping.wait(LOOK_S)
            self.end_if_asked()
        if paused:
            logger.info("going on")

    def _backlog(self) -> Backlog | None:
        try:
            return Backlog.from_json(self._client.get(keys.BACKLOG))
        except redis.RedisError:
            return None

    def _tell_if_due(self, progress: Mapping[str, Any]) -> None:
        phase = progress.get("phase")
        if self._clock() - self._told_at >= TELL_S or phase != self._phase:
            self._told_at, self._phase = self._clock(), phase
            self._tell(progress)

    def _tell(self, progress: Mapping[str, Any]) -> None:
        request = self._request
        try:
            request.task.backend.store_result(request.id, dict(progress), "PROGRESS")
        except LeaseEnded:
            raise WorkerStopping from None
        except Exception as error:  # noqa: BLE001 - a run that nobody hears of goes on
            logger.warning("the progress of task %s is not told: %s", request.id, error)
        shown = ", ".join(f"{name} {_short(value)}" for name, value in progress.items())
        request.send_event("task-progress", result=shown)  # Flower shows it as state and result


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
