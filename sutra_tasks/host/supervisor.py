"""Starts worker processes, restarts those that die, and stops all of them in order.

A dead worker is reaped at once: it leaves the fleet and its messages are requeued, long before its lease
ends.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Final

import redis
from celery.utils.log import get_logger

from sutra_tasks.batching.watchdog import HUNG
from sutra_tasks.broker.queues import new_incarnation
from sutra_tasks.host.processes import reap_orphans, spawn, stop, uninterrupted
from sutra_tasks.membership.reaper import reap
from sutra_tasks.membership.unstarted import CANNOT_START, why_unstarted
from sutra_tasks.settings import without_foreign

if TYPE_CHECKING:
    import subprocess

    from sutra_tasks.host.hardware import DeviceSpec
    from sutra_tasks.settings import Settings

__all__ = ["PYTHON", "Supervisor", "WorkerSpec", "restart_delay_s", "worker_specs"]

logger = get_logger(__name__)

STABLE_S: Final = 10.0
"""The crash of a process that lived this long counts as its first."""

PYTHON: Final = (sys.executable, "-P")
"""Starts Python without the current folder among the places of modules: a file there, such as
``statistics.py``, would replace the module of that name."""

LONGEST_DELAY_S: Final = 10.0
LEAST_CRASHES: Final = 3
"""Crashes in a row, each soon after the start, after which a worker counts as one that cannot start."""
POLL_S: Final = 0.2


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """One process to keep alive; ``device_id`` is None unless it is a device worker."""

    name: str
    command: Sequence[str]
    environ: Mapping[str, str]
    device_id: str | None = None


@dataclass(slots=True)
class _Child:
    spec: WorkerSpec
    process: subprocess.Popen[bytes] | None = None
    incarnation: str = ""
    started_at: float = 0.0
    crashes: int = 0
    due_at: float = 0.0


def restart_delay_s(crashes: int, lived_s: float) -> float:
    """Return the pause before a restart: none after the first crash, then doubling from a second.

    The time for which the process lived is part of it, because the pause limits how often it starts.
    """
    return 0.0 if crashes <= 1 else max(0.0, min(2.0 ** (crashes - 2), LONGEST_DELAY_S) - lived_s)


def worker_specs(
    options: Settings,
    devices: Sequence[DeviceSpec],
    *,
    number: int = 1,
    worker_options: Sequence[str] = (),
) -> list[WorkerSpec]:
    """Return the router, the devices, and a distill worker if there are folders for it.

    Args:
        options: of all workers.
        devices: to start.
        number: of the fleet on this machine.
        worker_options: of ``celery worker``.
    """
    shared = options.as_env()
    module = [*PYTHON, "-m", "sutra_tasks.roles"]

    def without_device(role: str) -> WorkerSpec:
        named = ["--hostname", f"{role}-{number}@%h"] if number > 1 else []
        return WorkerSpec(role, [*module, role, *named, *worker_options], shared)

    devices_to_start = [
        WorkerSpec(
            device.id,
            [*module, "device", *worker_options],
            {**shared, **device.environ, "SUTRA_DEVICE_ID": device.id},
            device_id=device.id,
        )
        for device in devices
    ]
    distillers = [without_device("distill")] if options.data_dir and options.models_dir else []
    return [without_device("router"), *devices_to_start, *distillers]


class Supervisor:
    """Keeps the processes of ``specs`` alive; :meth:`step` is one look at them.

    Attributes:
        cannot_start: why a process cannot start, by its own words or because it died again and again;
            None: none has. It is restarted all the same, with growing pauses, because what ends a fleet
            that is about to start must not end one that serves.
        is_starting: whether the fleet has not served yet, so that each crash is one at the start,
            however long the process lived: a model may take minutes to load.
    """

    def __init__(
        self,
        specs: Sequence[WorkerSpec],
        client: redis.Redis,
        *,
        results: redis.Redis,
        drain_s: float,
        report: Callable[[str], None],
        output: Mapping[str, IO[bytes]] | None = None,
    ) -> None:
        """Prepare; :meth:`start` starts the processes.

        Args:
            specs: the processes.
            client: the broker.
            results: the results server.
            drain_s: seconds that a worker may drain before it is killed.
            report: called with a line for people when a process died.
            output: files for the output of processes, by name; others write to this process's output.
        """
        self._children = [_Child(spec) for spec in specs]
        self._client, self._results = client, results
        self._drain_s, self._report = drain_s, report
        self._output = output or {}
        self._unreaped: dict[str, bool] = {}  # incarnation -> whether it died
        self.cannot_start: str | None = None
        self.is_starting = False

    @property
    def pids(self) -> dict[str, int]:
        """Process ids of the running processes, by name."""
        return {c.spec.name: c.process.pid for c in self._children if c.process is not None}

    @property
    def incarnations(self) -> dict[str, str]:
        """Incarnations of the running processes, by name."""
        return {c.spec.name: c.incarnation for c in self._children if c.process is not None}

    def start(self, now: float) -> None:
        """Start every process."""
        for child in self._children:
            self._launch(child, now)

    def step(self, now: float) -> float:
        """Reap dead workers, restart those that are due, and return the seconds until the next step."""
        self._reap_ended()
        reap_orphans(self.pids.values())
        for child in self._children:
            if child.process is not None and child.process.poll() is not None:
                self._note_death(child, now)
            if child.process is None and now >= child.due_at:
                self._launch(child, now)
        return POLL_S

    def stop(self) -> None:
        """Stop every process; messages that a worker could not finish in ``drain_s`` are requeued."""
        running = [child for child in self._children if child.process is not None]
        for child in running:
            # All get SIGTERM before any is awaited, so that they drain at the same time.
            if child.process is not None and child.process.poll() is None:
                child.process.terminate()
        for child in running:
            if child.process is not None:
                stop(child.process, self._drain_s)
                self._reap(child, died=False)
                child.process = None

    def _launch(self, child: _Child, now: float) -> None:
        child.incarnation = new_incarnation(child.spec.device_id)
        own = {**child.spec.environ, "SUTRA_INCARNATION": child.incarnation}
        environ = {**without_foreign(os.environ), **own}
        with uninterrupted():
            child.process = spawn(
                child.spec.command, environ=environ, output=self._output.get(child.spec.name)
            )
        child.started_at = now

    def _note_death(self, child: _Child, now: float) -> None:
        assert child.process is not None
        status = child.process.wait()
        lived_s = now - child.started_at
        was_stable = lived_s >= STABLE_S and not self.is_starting
        child.crashes = 1 if was_stable else child.crashes + 1
        delay_s = restart_delay_s(child.crashes, lived_s)
        child.due_at = now + delay_s
        child.process = None
        how, when = _how(status), f"in {delay_s:.1f} s" if delay_s else "now"
        requeued = self._reap(child, died=True)
        if status == CANNOT_START:
            why = why_unstarted(self._client, child.incarnation) or "its output says why"
            self.cannot_start = f"{child.spec.name} cannot start: {why}"
            if not self.is_starting:  # else who waits for the start raises it
                self._report(f"{self.cannot_start}; trying again {when}")
            return
        if child.crashes >= LEAST_CRASHES:
            self.cannot_start = (
                f"{child.spec.name} ended {child.crashes} times soon after its start, "
                f"the last time with {how}; its output may say why"
            )
        self._report(
            f"{child.spec.name} ended with {how}; {requeued} messages were requeued; restarting {when}"
        )

    def _reap(self, child: _Child, *, died: bool) -> int:
        """Reap an ended worker, or at a later step if the server is away; return messages requeued."""
        self._unreaped[child.incarnation] = died
        return self._reap_ended()

    def _reap_ended(self) -> int:
        requeued = 0
        for incarnation, died in list(self._unreaped.items()):
            try:
                requeued += reap(self._client, self._results, incarnation, died=died)
            except redis.RedisError as error:
                logger.warning("the server is away, messages of %s wait: %s", incarnation, error)
                break
            del self._unreaped[incarnation]
        return requeued


def _how(status: int) -> str:
    """Return an exit status in words; a negative one is a signal's number."""
    if status == HUNG:
        return f"status {status}: a batch hung"
    if status >= 0:
        return f"status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"
    killed = ", as the system does when memory runs out" if name == "SIGKILL" else ""
    return f"signal {-status} ({name}{killed})"
