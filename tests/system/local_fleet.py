"""A fleet in child processes of the test: routers, devices, and a supervisor that a thread steps."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import redis

from sutra_tasks import keys
from sutra_tasks.cli.status import DeviceStatus, FleetStatus, read
from sutra_tasks.health.states import DeviceState
from sutra_tasks.host.hardware import plan_devices
from sutra_tasks.host.supervisor import Supervisor, WorkerSpec, worker_specs
from sutra_tasks.settings import Settings
from tests.conftest import wait_until

FAULTY_DEVICE = Path(__file__).with_name("faulty_device.py")
START_S = 60


@dataclass
class LocalFleet:
    """A running fleet, and the reports of its supervisor."""

    options: Settings
    client: redis.Redis
    supervisor: Supervisor
    device_ids: list[str]
    router_names: list[str]
    reports: list[str]
    log: Path
    lock: threading.Lock = field(default_factory=threading.Lock)

    def status(self) -> FleetStatus:
        return read(self.client, self.options.device_ttl_s)

    def device(self, name: str) -> DeviceStatus:
        return next(device for device in self.status().devices if device.id == name)

    def live(self) -> set[str]:
        return {device.id for device in self.status().devices if device.live}

    def pid(self, name: str) -> int:
        with self.lock:
            return self.supervisor.pids[name]

    def incarnation(self, name: str) -> str:
        return str(self._record(name)["incarnation"])

    def all_serve(self) -> bool:
        """Return whether all routers and devices serve; one that was just killed may still count."""
        status = self.status()
        serving = {d.id for d in status.devices if d.live and d.state is DeviceState.HEALTHY}
        routing = {router["name"].removesuffix("@test") for router in status.routers}
        return serving >= set(self.device_ids) and routing >= set(self.router_names)

    def await_replacement(self, name: str, pid: int) -> None:
        """Return once another process than ``pid`` runs under this name, and serves."""

        def serves() -> bool:
            record = self._record(name)
            return record.get("pid") not in (None, pid) and record.get("state", "healthy") == "healthy"

        wait_until(serves, within_s=START_S)

    def await_end(self, pid: int) -> None:
        """Return once a process has ended; the supervisor notices it only after ``lock`` is free."""
        wait_until(lambda: psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, within_s=START_S)

    def await_lease_end(self, incarnation: str) -> None:
        """Return once the lease has ended and the worker's messages have been requeued."""
        wait_until(lambda: not self.client.hexists(keys.leases(), incarnation))

    def _record(self, name: str) -> dict[str, Any]:
        """Return the newest record of the worker of this name."""
        if name in self.device_ids:
            record: Any = self.client.get(keys.device(name))
            return json.loads(record) if record is not None else {}
        stored = sorted(self.client.scan_iter(keys.router("*")), key=self.client.pttl)
        texts: Any = self.client.mget(stored) if stored else []
        routers = [json.loads(text) for text in texts if text is not None]
        return next((one for one in reversed(routers) if one["name"] == f"{name}@test"), {})

    def is_empty(self) -> bool:
        """Return whether no message waits or is in flight anywhere in the fleet."""
        waiting, in_flight = (keys.EMBED_QUEUE, keys.DEVICE_QUEUE_PREFIX), keys.in_flight("")
        # A message that moves between two looks is in one of the later ones.
        patterns = (in_flight, *waiting, in_flight, *waiting, in_flight)
        return not any(any(self.client.scan_iter(f"{one}*", count=1000)) for one in patterns)


@contextmanager
def frozen(*pids: int) -> Iterator[None]:
    """Stop processes (SIGSTOP) for the length of a block, which may kill them."""
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
            wait_until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)  # noqa: B023
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


@contextmanager
def local_fleet(
    options: Settings,
    client: redis.Redis,
    folder: Path,
    *,
    devices: int = 1,
    routers: int = 1,
    host: str = "t",
    faults: Path | None = None,
    environs: Mapping[str, Mapping[str, str]] | None = None,
    await_live: bool = True,
    results: redis.Redis | None = None,
) -> Iterator[LocalFleet]:
    """Run a fleet for the length of a block.

    Args:
        options: of every worker.
        client: a client of the server that ``options`` name.
        folder: for the workers' log.
        devices: how many devices, simulated unless ``options`` say otherwise.
        routers: how many routers.
        host: the beginning of the devices' names.
        faults: a folder; devices fail as their texts say, and write there what they computed.
        environs: additional environment variables, by the worker's name.
        await_live: whether the block begins only when all workers serve.
        results: a client of the results server, if it is another one.
    """
    planned = (
        plan_devices(host=host, engine=options.engine, gpus=(), cores=2, count=devices)
        if devices
        else ()
    )
    router, *specs = worker_specs(options, planned)
    specs = [*_routers(router, routers), *specs]
    if faults is not None:
        specs = [_faulty(one, faults) if one.device_id else one for one in specs]
    more = environs or {}
    specs = [replace(one, environ={**one.environ, **more.get(one.name, {})}) for one in specs]
    names = [one.name for one in specs]
    reports: list[str] = []
    path = folder / "workers.log"
    ended = threading.Event()
    with path.open("ab") as log:
        supervisor = Supervisor(
            specs, client, results=results or client, drain_s=options.drain_s, report=reports.append,
            output=dict.fromkeys(names, log),
        )  # fmt: skip
        fleet = LocalFleet(
            options, client, supervisor, [one.id for one in planned], names[:routers], reports, path
        )

        def supervise() -> None:
            while not ended.is_set():
                with fleet.lock:
                    pause_s = supervisor.step(time.monotonic())
                ended.wait(pause_s)

        supervising = threading.Thread(target=supervise)
        try:
            supervisor.start(time.monotonic())
            supervising.start()
            if await_live:
                wait_until(fleet.all_serve, within_s=START_S)
            yield fleet
        finally:
            ended.set()
            if supervising.ident is not None:
                supervising.join()
            supervisor.stop()


def _routers(spec: WorkerSpec, count: int) -> list[WorkerSpec]:
    """Return ``count`` routers, each with its own node name."""
    return [
        replace(spec, name=name, command=[*spec.command, "--hostname", f"{name}@test"])
        for name in ["router", *(f"router{n}" for n in range(1, count))][:count]
    ]


def _faulty(spec: WorkerSpec, folder: Path) -> WorkerSpec:
    command: Sequence[str] = [sys.executable, str(FAULTY_DEVICE), "device"]
    return replace(spec, command=command, environ={**spec.environ, "FAULTS": str(folder)})
