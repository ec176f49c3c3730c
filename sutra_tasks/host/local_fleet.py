"""A fleet on this machine: what to start, for how long, and when it is ready."""

from __future__ import annotations

import os
import platform
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, Final

from sutra_tasks.connections import broker_client, results_client
from sutra_tasks.errors import SutraError
from sutra_tasks.host.hardware import count_cores, count_gpus, plan_devices, visible_gpus
from sutra_tasks.host.supervisor import Supervisor, WorkerSpec
from sutra_tasks.membership.fleet import fleet_members

if TYPE_CHECKING:
    from sutra_tasks.host.hardware import DeviceSpec
    from sutra_tasks.settings import Settings

__all__ = ["await_devices", "local_devices", "run_workers", "stop_on_signals"]

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
def run_workers(
    options: Settings,
    specs: Sequence[WorkerSpec],
    *,
    report: Callable[[str], None],
    output: Mapping[str, IO[bytes]] | None = None,
) -> Iterator[Supervisor]:
    """Run processes for the length of a block."""
    client, results = broker_client(options), results_client(options)
    supervisor = Supervisor(
        specs, client, results=results, drain_s=options.drain_s, report=report, output=output
    )
    try:
        supervisor.start(time.monotonic())
        yield supervisor
    finally:
        supervisor.stop()
        client.close()
        results.close()


def await_devices(supervisor: Supervisor, options: Settings, devices: Sequence[DeviceSpec]) -> None:
    """Return once every device is in the fleet, restarting what dies meanwhile."""
    client = broker_client(options)
    deadline = time.monotonic() + START_TIMEOUT_S
    wanted = {device.id for device in devices}
    while True:
        seen = fleet_members(client)
        live = [one for one in seen if one.heartbeat_age_s <= options.device_ttl_s]
        if wanted <= {one.id for one in live if one.takes_work}:
            client.close()
            return
        if time.monotonic() > deadline:
            raise SutraError(f"the devices did not start within {START_TIMEOUT_S:.0f} s")
        time.sleep(supervisor.step(time.monotonic()))


def local_devices(options: Settings, wanted: int | None, replicas: int = 1) -> tuple[DeviceSpec, ...]:
    """Decide this machine's devices, and how many workers each has."""
    return plan_devices(
        host=platform.node(),
        engine=options.engine,
        gpus=visible_gpus(count_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES")),
        cores=count_cores(),
        wanted=wanted,
        replicas=replicas,
    )
