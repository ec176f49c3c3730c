"""Real processes on a real server: each test starts its own fleet and leaves nothing behind."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import redis

from sutra_tasks.app import app
from sutra_tasks.cli.status import FleetStatus, read
from sutra_tasks.configuration import celery_settings
from sutra_tasks.fleet.hardware import plan_devices
from sutra_tasks.fleet.server import embedded_server
from sutra_tasks.fleet.supervisor import Supervisor, worker_specs
from sutra_tasks.settings import Settings, settings
from tests import conftest

ROOT = Path(__file__).parents[2]
OF_THE_FLEET = (b"_kombu.binding", b"sutra:fleet", b"sutra:queues", b"sutra:leases")
"""What lasts by design, bounded by the number of devices; a router cleans it."""


@dataclass
class LocalFleet:
    """A router and devices under a supervisor that a thread keeps looking at."""

    options: Settings
    client: redis.Redis
    supervisor: Supervisor
    device_ids: list[str]
    reports: list[str]
    lock: threading.Lock = field(default_factory=threading.Lock)

    def status(self) -> FleetStatus:
        return read(self.client, self.options.device_ttl_s)

    def live(self) -> set[str]:
        return {device.id for device in self.status().devices if device.live}

    def pid(self, name: str) -> int:
        with self.lock:
            return self.supervisor.pids[name]


def _configure_anew() -> None:
    """Make this process's app read its settings again, as a fresh process would."""
    settings.cache_clear()
    app.conf.update(celery_settings(settings()))
    app._backend_cache = app._pool = app.amqp._producer_pool = None
    app._local.__dict__.pop("backend", None)


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """Run one server for the session, and make this process its client."""
    with embedded_server() as address:
        os.environ["SUTRA_BROKER_URL"] = address
        _configure_anew()
        yield address
        app.close()
        del os.environ["SUTRA_BROKER_URL"]
        _configure_anew()


@pytest.fixture
def client(server: str) -> Iterator[redis.Redis]:
    """Give a clean server, and see that only what expires is left on it."""
    client = redis.Redis.from_url(server)
    client.flushall()
    yield client
    lasting = [
        key
        for key in client.scan_iter()
        if client.ttl(key) == -1 and not key.startswith(OF_THE_FLEET)
    ]
    client.flushall()
    client.close()
    assert lasting == []


@pytest.fixture
def wait_until() -> Callable[..., None]:
    return conftest.wait_until


@pytest.fixture
def start_fleet(server: str, client: redis.Redis, tmp_path: Path) -> Callable[..., object]:
    """Return a context manager that runs a fleet of simulated devices."""

    @contextmanager
    def start(devices: int = 1, *, await_live: bool = True, **options: object) -> Iterator[LocalFleet]:
        defaults: dict[str, object] = {
            "engine": "simulated",
            "heartbeat_s": 0.2,
            "device_ttl_s": 2.0,
        }
        chosen = replace(Settings(broker_url=server), **(defaults | options))  # type: ignore[arg-type]
        specs = (
            plan_devices(host="t", engine=chosen.engine, gpus=(), cores=2, wanted=devices)
            if devices
            else ()
        )
        workers = worker_specs(chosen, specs)
        log = (tmp_path / "workers.log").open("ab")
        reports: list[str] = []
        supervisor = Supervisor(
            workers, client, results=client, drain_s=chosen.drain_s, report=reports.append,
            output=dict.fromkeys([w.name for w in workers], log),
        )  # fmt: skip
        fleet = LocalFleet(chosen, client, supervisor, [s.id for s in specs], reports)
        ended = threading.Event()

        def look() -> None:
            while not ended.is_set():
                with fleet.lock:
                    pause_s = supervisor.step(time.monotonic())
                ended.wait(pause_s)

        looking = threading.Thread(target=look)
        try:
            supervisor.start(time.monotonic())
            looking.start()
            if await_live:
                conftest.wait_until(
                    lambda: fleet.live() == set(fleet.device_ids) and fleet.status().routers,
                    within_s=60,
                )
            yield fleet
        finally:
            ended.set()
            looking.join()
            supervisor.stop()
            log.close()

    return start


@pytest.fixture
def run_python(server: str) -> Callable[..., str]:
    """Run a script as an application of its own, and return what it printed."""

    def run(script: str, *arguments: str, **environ: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments],
            env={**os.environ, **environ},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
