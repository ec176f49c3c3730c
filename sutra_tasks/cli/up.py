"""``sutra up``: a server if there is none, a router, the devices, and Flower if wanted."""

from __future__ import annotations

import os
import platform
import signal
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

import redis
from rich.console import Console

from sutra_tasks.cli.status import read, table
from sutra_tasks.errors import SettingsError, SutraError
from sutra_tasks.fleet.hardware import count_cores, count_gpus, plan_devices, visible_gpus
from sutra_tasks.fleet.server import embedded_server, is_free
from sutra_tasks.fleet.supervisor import Supervisor, WorkerSpec, worker_specs

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sutra_tasks.fleet.hardware import DeviceSpec
    from sutra_tasks.settings import Settings

__all__ = ["fleet", "run", "stop_on_signals"]

DEFAULT_PORT: Final = 6379
FLOWER_PORT: Final = 5555
START_TIMEOUT_S: Final = 300.0


class _Stop(BaseException):
    """A signal asked this process to end."""


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into an orderly end of the block; more of them change nothing."""

    def end(signum: int, frame: Any) -> None:  # noqa: ARG001 - a signal handler's shape
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, signal.SIG_IGN)
        raise _Stop

    before = {name: signal.signal(name, end) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except _Stop:
        pass
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


@contextmanager
def fleet(
    options: Settings,
    specs: Sequence[WorkerSpec],
    *,
    report: Any,
    output: Any = None,
) -> Iterator[Supervisor]:
    """Run processes for the length of a block."""
    client = redis.Redis.from_url(options.broker_url or "", socket_timeout=5)
    supervisor = Supervisor(specs, client, drain_s=options.drain_s, report=report, output=output)
    try:
        supervisor.start(time.monotonic())
        yield supervisor
    finally:
        supervisor.stop()
        client.close()


def await_devices(supervisor: Supervisor, options: Settings, devices: Sequence[DeviceSpec]) -> None:
    """Return once every device is in the fleet, restarting what dies meanwhile."""
    client = redis.Redis.from_url(options.broker_url or "", socket_timeout=5)
    deadline = time.monotonic() + START_TIMEOUT_S
    wanted = {device.id for device in devices}
    while True:
        seen = read(client, options.device_ttl_s)
        if wanted <= {device.id for device in seen.devices if device.live}:
            client.close()
            return
        if time.monotonic() > deadline:
            raise SutraError(f"the devices did not start within {START_TIMEOUT_S:.0f} s")
        time.sleep(supervisor.step(time.monotonic()))


def plan(options: Settings, wanted: int | None) -> tuple[DeviceSpec, ...]:
    """Decide this machine's devices."""
    return plan_devices(
        host=platform.node(),
        engine=options.engine,
        gpus=visible_gpus(count_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES")),
        cores=count_cores(),
        wanted=wanted,
    )


def run(
    options: Settings, *, devices: int | None, port: int | None, flower: bool, log_level: str
) -> None:
    """Start everything, say what to do with it, and keep it alive until a signal."""
    console = Console(stderr=True)
    chosen = plan(options, devices)
    if flower and find_spec("flower") is None:
        raise SettingsError("--flower", "", "needs pip install 'sutra-tasks[flower]'")
    with stop_on_signals(), ExitStack() as stack:
        if options.broker_url is None:
            if port is None and is_free(DEFAULT_PORT):
                port = DEFAULT_PORT
            options = replace(options, broker_url=stack.enter_context(embedded_server(port)))
        began = time.monotonic()
        events = ["-E"] if flower else []
        specs = worker_specs(options, chosen, worker_options=["--loglevel", log_level, *events])
        if flower:
            specs.append(_flower(options))
        supervisor = stack.enter_context(
            fleet(options, specs, report=lambda line: console.print(f"[yellow]{line}[/]"))
        )
        what = options.model if options.engine == "torch" else f"the {options.engine} engine"
        with console.status(f"starting {len(chosen)} devices with {what} ..."):
            await_devices(supervisor, options, chosen)
        client = redis.Redis.from_url(options.broker_url or "", socket_timeout=5)
        console.print(table(read(client, options.device_ttl_s)))
        console.print(f"ready in {time.monotonic() - began:.1f} s. In your application:\n")
        console.print(f"  export SUTRA_BROKER_URL={options.broker_url}\n", highlight=False)
        if flower:
            console.print(f"Flower: http://127.0.0.1:{FLOWER_PORT}", highlight=False)
        console.print("Ctrl-C stops the fleet.")
        while True:
            time.sleep(supervisor.step(time.monotonic()))
    console.print("stopped.")


def _flower(options: Settings) -> WorkerSpec:
    command = [
        sys.executable, "-m", "celery", "-A", "sutra_tasks", "flower",
        "--address=127.0.0.1", f"--port={FLOWER_PORT}", "--logging=warning",
    ]  # fmt: skip
    return WorkerSpec("flower", command, options.as_env())
