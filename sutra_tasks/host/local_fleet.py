"""A fleet on this machine: runs its workers for the length of a block."""

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
from sutra_tasks.membership.names import Patience, holders, living
from sutra_tasks.membership.reaper import reap

if TYPE_CHECKING:
    from sutra_tasks.host.hardware import DeviceSpec
    from sutra_tasks.settings import Settings

__all__ = ["await_devices", "free_fleet_number", "local_devices", "run_workers", "stop_on_signals"]

START_TIMEOUT_S: Final = 300.0


class _Stop(BaseException):
    """SIGINT or SIGTERM asked this process to end."""


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """End the block in order at the first SIGINT or SIGTERM; later ones are ignored."""

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
    """Run worker processes for the length of a block.

    Args:
        options: with the addresses of the servers, and how long workers may drain.
        specs: the processes.
        report: called with a line for people when a process died.
        output: files for the output of processes, by name; others write to this process's output.

    Yields:
        The supervisor. Call its ``step`` again and again, so that it restarts what dies.
    """
    with broker_client(options) as client, results_client(options) as results:
        supervisor = Supervisor(
            specs, client, results=results, drain_s=options.drain_s, report=report, output=output
        )
        try:
            supervisor.start(time.monotonic())
            yield supervisor
        finally:
            supervisor.stop()


def await_devices(supervisor: Supervisor, options: Settings, devices: Sequence[DeviceSpec]) -> None:
    """Return once every device takes work; restart workers that die meanwhile.

    Raises:
        SutraError: this took longer than five minutes.
    """
    deadline = time.monotonic() + START_TIMEOUT_S
    expected = {device.id for device in devices}
    with broker_client(options) as client:
        while True:
            present = {
                one.id
                for one in fleet_members(client)
                if one.is_live(options.device_ttl_s) and one.takes_work
            }
            if expected <= present:
                return
            if time.monotonic() > deadline:
                raise SutraError(f"the devices did not start within {START_TIMEOUT_S:.0f} s")
            time.sleep(supervisor.step(time.monotonic()))


def free_fleet_number(options: Settings, count: int | None, replicas: int = 1) -> int:
    """Return the number of a new fleet on this machine: the least whose names no live worker has.

    Reaps workers of that number that have ended, so that their successors need not wait for it.

    Raises:
        redis.RedisError: the server does not answer.
    """
    patience = Patience(silent_s=options.device_ttl_s, unborn_s=options.lease_s)
    with broker_client(options) as client, results_client(options) as results:
        number = 1
        while True:
            devices = local_devices(options, count, replicas, number)
            ended = holders(client, [device.id for device in devices])
            if not living(client, ended, patience=patience):
                break
            number += 1
        for incarnation in ended:
            reap(client, results, incarnation)
    return number


def local_devices(
    options: Settings, count: int | None, replicas: int = 1, number: int = 1
) -> tuple[DeviceSpec, ...]:
    """Decide the device workers of this machine; see :func:`~sutra_tasks.host.hardware.plan_devices`."""
    return plan_devices(
        host=platform.node(),
        engine=options.engine,
        gpus=visible_gpus(count_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES")),
        cores=count_cores(),
        count=count,
        replicas=replicas,
        number=number,
    )
