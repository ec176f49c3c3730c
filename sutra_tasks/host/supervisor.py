"""Starts worker processes, restarts those that die, and stops all of them in order.

A dead worker is reaped at once: it leaves the fleet and its messages are requeued, long before its lease
ends.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Final

import redis
from celery.utils.log import get_logger

from sutra_tasks.broker.queues import new_incarnation
from sutra_tasks.host.processes import spawn, stop, uninterrupted
from sutra_tasks.membership.reaper import reap
from sutra_tasks.settings import without_foreign

if TYPE_CHECKING:
    import subprocess

    from sutra_tasks.host.hardware import DeviceSpec
    from sutra_tasks.settings import Settings

__all__ = ["Supervisor", "WorkerSpec", "restart_delay_s", "worker_specs"]

logger = get_logger(__name__)

STABLE_S: Final = 10.0
"""The crash of a process that lived this long counts as its first."""

LONGEST_DELAY_S: Final = 10.0
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
    module = [sys.executable, "-m", "sutra_tasks.roles"]

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
    """Keeps the processes of ``specs`` alive; :meth:`step` is one look at them."""

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

    @property
    def pids(self) -> dict[str, int]:
        """Process ids of the running processes, by name."""
        return {c.spec.name: c.process.pid for c in self._children if c.process is not None}

    def start(self, now: float) -> None:
        """Start every process."""
        for child in self._children:
            self._launch(child, now)

    def step(self, now: float) -> float:
        """Reap dead workers, restart those that are due, and return the seconds until the next step."""
        self._reap_ended()
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
        child.crashes = 1 if lived_s >= STABLE_S else child.crashes + 1
        delay_s = restart_delay_s(child.crashes, lived_s)
        child.due_at = now + delay_s
        child.process = None
        how = f"signal {-status}" if status < 0 else f"status {status}"
        when = f"in {delay_s:.1f} s" if delay_s else "now"
        requeued = self._reap(child, died=True)
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
