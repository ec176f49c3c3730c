"""The distill worker: one run at a time, which can be watched, paused, cancelled and killed.

Its message is held like any other until the run has ended, so it is delivered to nobody else while this
process lives; after a death it comes back, and the run goes on at its last checkpoint.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

import redis
from celery.concurrency.thread import ApplyResult
from celery.concurrency.thread import TaskPool as ThreadPool
from celery.exceptions import Ignore, Reject, TimeoutError  # noqa: A004 - what results raise
from celery.result import allow_join_result
from celery.utils.log import get_logger
from celery.worker.state import revoked

from sutra_tasks import keys
from sutra_tasks.admission import Backlog
from sutra_tasks.bulk import embed_many
from sutra_tasks.distillation.material import gather
from sutra_tasks.distillation.run import Run
from sutra_tasks.distillation.tasks import serve
from sutra_tasks.encoding.models import registry
from sutra_tasks.errors import DistillationUnderWayError, SettingsError, SutraError
from sutra_tasks.fleet.acknowledging import run_task
from sutra_tasks.fleet.hardware import count_cores
from sutra_tasks.fleet.registry import serves, sightings
from sutra_tasks.fleet.sampling import sampler
from sutra_tasks.settings import settings

if TYPE_CHECKING:
    from sutra_tasks.distillation.config import DistillationConfig
    from sutra_tasks.settings import Settings
    from sutra_tasks.vectors import Floats

__all__ = ["DistillPool", "Pacer"]

logger = get_logger(__name__)

TELL_S: Final = 1.0
LOCK_S: Final = keys.DISTILLING_S / 4
LOOK_S: Final = 0.5
FLEET_S: Final = 300.0
"""Seconds that the fleet may take for some of the teacher's vectors, until they are computed here."""
RESUME_SHARE: Final = 0.5
"""Share of the pause's threshold under which a run goes on, so that it does not flap."""

TAKE: Final = """#!lua flags=allow-oom
local held = redis.call('GET', KEYS[1])
if held and string.sub(held, 1, #ARGV[1]) ~= ARGV[1] then return held end
redis.call('SET', KEYS[1], ARGV[1] .. ARGV[2], 'EX', ARGV[3])
return false
"""
"""KEYS: who makes a model's next version. ARGV: the task, its process, seconds. Returns who holds it, if
it is another task: one that is delivered again after a death takes over from itself."""

LET_GO: Final = """
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
"""


class _Stopping(Exception):  # noqa: N818 - not an error: the run goes on where the worker starts next
    """The worker is to end."""


class _Cancelled(Exception):  # noqa: N818 - not an error: its caller gave it up
    """The run is not wanted any more."""


class Pacer:
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


class DistillPool(ThreadPool):  # type: ignore[misc]  # Celery is untyped
    """Celery's thread pool, of one thread, whose runs end in good order when the worker does."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._options = settings()
        timeout_s = self._options.socket_timeout_s
        self._client = redis.Redis.from_url(self._options.broker_url or "", socket_timeout=timeout_s)
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
        options = self._options
        store = registry(options)
        if store is None:
            raise SettingsError("SUTRA_MODELS_DIR", "", "not set: the folder that gets the student")
        _use_threads(options)
        kept = sampler(self._client, options) if config.sample else None
        material = gather(config, options, kept.texts() if kept is not None else ())
        watch = _Watch(self._client, options, self._request, self._stopping)
        by_fleet = self._by_fleet(config.teacher)
        run = Run(config, material, options, store, watch=watch, by_fleet=by_fleet)
        try:
            with self._alone(run.name, watch):
                if (found := run.made()) is None:
                    return run.make()
        except _Cancelled:
            run.forgive()
            self._request.revoked()  # says so to its caller
            raise Ignore from None
        except _Stopping:
            run.forgive()
            raise Reject("the worker is stopping", requeue=True) from None
        logger.info("%s was made of the same recipe and texts: nothing to do", found["model"])
        return found

    @contextmanager
    def _alone(self, name: str, watch: _Watch) -> Iterator[None]:
        """Make the next version of a model alone, or fail with who makes it."""
        task, lock = f"{self._request.id} ", keys.distilling(name)

        def take() -> None:
            held: Any = self._client.eval(TAKE, 1, lock, task, self._incarnation, str(keys.DISTILLING_S))
            if held:
                raise DistillationUnderWayError(name, held.decode().partition(" ")[0])

        take()
        watch.keep = take
        try:
            yield
        finally:
            with suppress(redis.RedisError):  # it expires
                self._client.eval(LET_GO, 1, lock, task + self._incarnation)

    def _by_fleet(self, teacher: str) -> Callable[[Sequence[str], str], Iterator[Floats]] | None:
        """Return how the fleet embeds texts with the teacher, if a live device has it in memory."""
        ttl_s = self._options.device_ttl_s
        able = any(
            one.record is not None
            and one.heartbeat_age_s <= ttl_s
            and serves(one)
            and teacher in one.record.models
            for one in sightings(self._client)
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


class _Watch:
    """Tells of a run, pauses it while the fleet has too much to do, and ends it when that is asked."""

    def __init__(
        self, client: redis.Redis, options: Settings, request: Any, stopping: threading.Event
    ) -> None:
        self._client, self._request, self._stopping = client, request, stopping
        self._pacer = Pacer(options.distill_pause_s)
        self._told_at = self._looked_at = self._kept_at = -float("inf")
        self.keep: Callable[[], None] = lambda: None

    def __call__(self, progress: Mapping[str, Any]) -> None:
        """See :class:`~sutra_tasks.distillation.run.Watch`."""
        self._end_if_asked()
        now = time.monotonic()
        if now - self._told_at >= TELL_S:
            self._told_at = now
            self._tell(progress)
        if now - self._looked_at >= LOOK_S:
            self._looked_at = now
            self._keep()
            if progress["phase"] != "teacher":  # then the fleet works for this run
                self._pause(progress)

    def _end_if_asked(self) -> None:
        if self._stopping.is_set():
            raise _Stopping
        if self._request.id in revoked:
            raise _Cancelled

    def _pause(self, progress: Mapping[str, Any]) -> None:
        paused = False
        while self._pacer.paused(self._backlog()):
            if not paused:
                logger.info("paused: the fleet is saturated")
                self._tell({**progress, "phase": "paused"})
                paused = True
            self._stopping.wait(LOOK_S)
            self._end_if_asked()
            self._keep()
        if paused:
            logger.info("going on")

    def _keep(self) -> None:
        if time.monotonic() - self._kept_at >= LOCK_S:
            with suppress(redis.RedisError):  # one that is away keeps its locks
                self.keep()
                self._kept_at = time.monotonic()

    def _backlog(self) -> Backlog | None:
        try:
            return Backlog.from_json(self._client.get(keys.BACKLOG))
        except redis.RedisError:
            return None

    def _tell(self, progress: Mapping[str, Any]) -> None:
        request = self._request
        try:
            request.task.backend.store_result(request.id, dict(progress), "PROGRESS")
        except Exception as error:  # noqa: BLE001 - a run that nobody hears of goes on
            logger.warning("the progress of task %s is not told: %s", request.id, error)
        shown = ", ".join(f"{name} {_short(value)}" for name, value in progress.items())
        request.send_event("task-progress", result=shown)  # Flower shows it as state and result


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _use_threads(options: Settings) -> None:
    import torch  # noqa: PLC0415 - seconds to import: only where a run begins

    torch.set_num_threads(options.distill_threads or count_cores())
