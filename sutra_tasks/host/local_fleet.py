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
from sutra_tasks.health.states import DeviceState
from sutra_tasks.host.hardware import count_cores, count_gpus, plan_devices, visible_gpus
from sutra_tasks.host.processes import END_SIGNALS, uninterrupted
from sutra_tasks.host.supervisor import Supervisor, WorkerSpec
from sutra_tasks.membership.fleet import fleet_members
from sutra_tasks.membership.names import Patience, holders, living
from sutra_tasks.membership.reaper import reap

if TYPE_CHECKING:
    from sutra_tasks.host.hardware import DeviceSpec
    from sutra_tasks.membership.device_record import DeviceRecord
    from sutra_tasks.settings import Settings

__all__ = ["await_devices", "free_fleet_number", "local_devices", "run_workers", "stop_on_signals"]

MOST_NAMED: Final = 4


class _Stop(BaseException):
    """A signal asked this process to end."""


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """End the block in order at the first signal that asks this process to end; ignore later ones.

    Under ``nohup`` the terminal may close.
    """
    handled = [one for one in END_SIGNALS if one is not signal.SIGHUP or not _is_ignored(one)]

    def end(signum: int, frame: Any) -> None:  # noqa: ARG001 - a signal handler's shape
        for one in handled:
            signal.signal(one, signal.SIG_IGN)
        raise _Stop

    before = {one: signal.signal(one, end) for one in handled}
    try:
        yield
    except _Stop:
        pass
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def _is_ignored(one: signal.Signals) -> bool:
    return signal.getsignal(one) is signal.SIG_IGN


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
            with uninterrupted():
                supervisor.stop()


def await_devices(
    supervisor: Supervisor,
    options: Settings,
    devices: Sequence[DeviceSpec],
    *,
    say: Callable[[str], None] = lambda _: None,
) -> None:
    """Return once every device takes work; restart workers that die meanwhile.

    Args:
        supervisor: of the devices.
        options: of the fleet.
        devices: those to wait for.
        say: called again and again with what they do; loading a model may take minutes.

    Raises:
        SutraError: a worker cannot start, or the fleet refuses a device; it says why.
    """
    refused_since: dict[str, float] = {}
    supervisor.is_starting = True
    with broker_client(options) as client:
        while True:
            now = time.monotonic()
            records = {one.id: one.record for one in fleet_members(client) if one.record is not None}
            ours = supervisor.incarnations
            awaited = {
                one.id: found if found is not None and found.incarnation == ours.get(one.id) else None
                for one in devices
                if not ((found := records.get(one.id)) and _serves(found, ours.get(one.id)))
            }
            if not awaited:
                supervisor.is_starting = False
                return
            if supervisor.cannot_start is not None:
                raise SutraError(supervisor.cannot_start)
            for name, record in awaited.items():
                if record is None or record.state is not DeviceState.REFUSED:
                    refused_since.pop(name, None)
                # What refuses it may be the vectors of a fleet that has just ended.
                elif now - refused_since.setdefault(name, now) > 2 * options.lease_s:
                    raise SutraError(f"{name} is refused by the fleet: {record.reason}")
            say(_doing(awaited))
            time.sleep(supervisor.step(now))


def _serves(record: DeviceRecord, incarnation: str | None) -> bool:
    """Say whether a record is that of this start, and not of the last one, and takes work."""
    return record.incarnation == incarnation and record.state.takes_work


def _doing(awaited: Mapping[str, DeviceRecord | None]) -> str:
    """Return what devices do before they serve."""
    names: dict[str, list[str]] = {}
    for name, record in awaited.items():
        doing = "starting" if record is None else record.reason or "starting"
        names.setdefault(doing, []).append(name)
    return "; ".join(
        f"{', '.join(ids) if len(ids) <= MOST_NAMED else f'{len(ids)} devices'}: {doing}"
        for doing, ids in names.items()
    )


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
