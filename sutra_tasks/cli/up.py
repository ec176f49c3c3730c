"""``sutra up``: runs a server if there is none, a router, device workers, beat, and Flower if asked."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Final

import redis
from rich.console import Console
from rich.markup import escape

from sutra_tasks.cli.server import warnings_of
from sutra_tasks.cli.status import read, table
from sutra_tasks.connections import broker_client
from sutra_tasks.errors import SettingsError, SutraError
from sutra_tasks.host.embedded_server import embedded_server, is_free
from sutra_tasks.host.local_fleet import (
    await_devices,
    free_fleet_number,
    local_devices,
    run_workers,
    stop_on_signals,
)
from sutra_tasks.host.supervisor import WorkerSpec, worker_specs

if TYPE_CHECKING:
    from sutra_tasks.settings import Settings

__all__ = ["run"]

DEFAULT_PORT: Final = 6379
FLOWER_PORT: Final = 5555


def run(
    options: Settings,
    *,
    devices: int | None,
    replicas: int,
    port: int | None,
    flower: bool,
    log_level: str,
) -> None:
    """Start all processes, print how to use them, and keep them alive until a signal."""
    console = Console(stderr=True)
    chosen = local_devices(options, devices, replicas)
    if flower and find_spec("flower") is None:
        raise SettingsError("--flower", "", "needs pip install 'sutra-tasks[flower]'")
    with stop_on_signals(), ExitStack() as stack:
        starts_server = options.broker_url is None
        if starts_server:
            if port is None and is_free(DEFAULT_PORT):
                port = DEFAULT_PORT
            options = replace(options, broker_url=stack.enter_context(embedded_server(port)))
        for warning in warnings_of(options, "operator"):
            console.print(f"[yellow]{escape(warning)}[/]", highlight=False)
        number = 1 if starts_server else free_fleet_number(options, devices, replicas)
        if number > 1:
            chosen = local_devices(options, devices, replicas, number)
            console.print(f"fleet {number} of this machine: live workers have the names of the first")
        began = time.monotonic()
        events = ["-E"] if flower else []
        worker_options = ["--loglevel", log_level, *events]
        specs = worker_specs(options, chosen, number=number, worker_options=worker_options)
        schedule = Path(stack.enter_context(TemporaryDirectory(prefix="sutra-beat-"))) / "schedule"
        specs.append(_beat(options, schedule, log_level))
        if flower:
            specs.append(_flower(options))
        supervisor = stack.enter_context(
            run_workers(options, specs, report=lambda line: console.print(f"[yellow]{line}[/]"))
        )
        what = options.model if options.engine == "torch" else f"the {options.engine} engine"
        with console.status(f"starting {len(chosen)} devices with {what} ..."):
            await_devices(supervisor, options, chosen)
        client = broker_client(options)
        console.print(table(read(client, options.device_ttl_s)))
        console.print(f"ready in {time.monotonic() - began:.1f} s. In your application:\n")
        console.print(f"  export SUTRA_BROKER_URL={options.broker_url}\n", highlight=False)
        if flower:
            console.print(f"Flower: http://127.0.0.1:{FLOWER_PORT}", highlight=False)
        console.print("Ctrl-C stops the fleet.")
        while True:
            time.sleep(supervisor.step(time.monotonic()))
            if starts_server:
                _check_server(client)
    console.print("stopped.")


def _check_server(client: redis.Redis) -> None:
    """Check that the server that this command started still answers.

    Raises:
        SutraError: it does not. Its messages are lost, because it keeps nothing on disk.
    """
    try:
        client.ping()
    except redis.TimeoutError:
        return  # it lives, but is busy or paused
    except redis.ConnectionError:
        raise SutraError(
            "the server that `sutra up` started has ended, and with it what waited there. For work "
            "that must outlive a server, run one with an append-only file and set SUTRA_BROKER_URL."
        ) from None


def _beat(options: Settings, schedule: Path, log_level: str) -> WorkerSpec:
    command = [
        sys.executable, "-m", "celery", "-A", "sutra_tasks", "--quiet", "beat",
        f"--schedule={schedule}", "--pidfile=", "--loglevel", log_level,
    ]  # fmt: skip
    return WorkerSpec("beat", command, options.as_env())


def _flower(options: Settings) -> WorkerSpec:
    command = [
        sys.executable, "-m", "celery", "-A", "sutra_tasks", "flower",
        "--address=127.0.0.1", f"--port={FLOWER_PORT}", "--logging=warning",
    ]  # fmt: skip
    return WorkerSpec("flower", command, options.as_env())
