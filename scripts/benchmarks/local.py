"""Runs a fleet for a benchmark (a server, a router, devices), and reads the processor time it uses."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from sutra_tasks.host.embedded_server import embedded_server
from sutra_tasks.host.hardware import DeviceSpec, count_cores, plan_devices
from sutra_tasks.host.local_fleet import await_devices, run_workers
from sutra_tasks.host.supervisor import Supervisor, worker_specs
from sutra_tasks.settings import Settings, settings

QUIET = ("--without-heartbeat",)
"""Options of all workers that are compared: no Celery heartbeats; events are off by default."""


@dataclass(frozen=True, slots=True)
class BenchFleet:
    """A running fleet."""

    options: Settings
    devices: Sequence[DeviceSpec]
    supervisor: Supervisor
    folder: Path

    @property
    def environ(self) -> dict[str, str]:
        """Return the environment for a client in another process."""
        return {**os.environ, **self.options.as_env()}

    def cpu_s(self, name: str) -> float:
        """Return the processor time in seconds that the worker ``name`` has used."""
        times = psutil.Process(self.supervisor.pids[name]).cpu_times()
        return float(times.user + times.system)


@contextmanager
def bench_fleet(options: Settings, *, devices: int, cores: int | None = None) -> Iterator[BenchFleet]:
    """Run a fleet; this process becomes its client.

    Args:
        options: settings of the workers; a server is started if they name none.
        devices: how many devices.
        cores: how many cores the devices share, as threads of their engines; None: all.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sutra-bench-")))
        address = options.broker_url or stack.enter_context(embedded_server())
        options = replace(options, broker_url=address)
        os.environ["SUTRA_BROKER_URL"] = address
        settings.cache_clear()
        specs = plan_devices(
            host="bench", engine=options.engine, gpus=(), cores=cores or count_cores(), count=devices
        )
        workers = worker_specs(options, specs, worker_options=QUIET)
        output = {
            spec.name: stack.enter_context((folder / f"{spec.name}.log").open("wb")) for spec in workers
        }
        supervisor = stack.enter_context(run_workers(options, workers, report=print, output=output))
        await_devices(supervisor, options, specs)
        yield BenchFleet(options, specs, supervisor, folder)


def elapsed(began: float) -> float:
    """Return the seconds since ``began``."""
    return time.perf_counter() - began
