"""Real processes on a real server: each test starts its own fleet and leaves nothing behind."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis

from sutra_tasks import keys
from sutra_tasks.app import app
from sutra_tasks.celery_settings import celery_settings
from sutra_tasks.host.embedded_server import embedded_server
from sutra_tasks.settings import Settings, settings
from tests import conftest
from tests.system.durable_server import DurableServer
from tests.system.local_fleet import LocalFleet, local_fleet
from tests.system.streams import Stream

ROOT = Path(__file__).parents[2]
OF_THE_FLEET = (b"_kombu.binding", b"sutra:fleet", b"sutra:queues", b"sutra:leases")
"""What lasts by design, bounded by the number of devices; a router cleans it."""

BRISK: dict[str, Any] = {
    "engine": "simulated", "heartbeat_s": 0.2, "device_ttl_s": 2.0, "lease_s": 3.0,
}  # fmt: skip
"""What a test's fleet differs in from the defaults: silence is noticed soon."""


def _configure_anew() -> None:
    """Make this process's app read its settings again, as a fresh process would."""
    if app._backend is not None:
        conftest.disconnect(app._backend)
    settings.cache_clear()
    app.conf.update(celery_settings(settings()))
    app._backend_cache = app._pool = app.amqp._producer_pool = None
    app._local.__dict__.pop("backend", None)


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Give this process's app other settings, as a fresh process would have them."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        _configure_anew()
        try:
            yield
        finally:
            app.close()
    _configure_anew()


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """Run one server for the session, and make this process its client."""
    with embedded_server() as address, environment(SUTRA_BROKER_URL=address):
        yield address


@contextmanager
def clean(client: redis.Redis) -> Iterator[redis.Redis]:
    """See that a block leaves on the server only what expires."""
    client.flushdb()
    yield client
    lasting = _lasting(client)
    client.flushdb()
    client.close()
    assert lasting == []


def _lasting(client: redis.Redis) -> list[bytes]:
    """Return the keys that neither expire nor belong to a fleet."""
    return [
        key for key in client.scan_iter() if client.ttl(key) == -1 and not key.startswith(OF_THE_FLEET)
    ]


@pytest.fixture
def client(server: str) -> Iterator[redis.Redis]:
    """Give a clean server, and see that only what expires is left on it."""
    with clean(redis.Redis.from_url(server)) as client:
        yield client


@pytest.fixture
def wait_until() -> Callable[..., None]:
    return conftest.wait_until


@pytest.fixture
def start_fleet(server: str, client: redis.Redis, tmp_path: Path) -> Callable[..., object]:
    """Return a context manager that runs a fleet of simulated devices."""

    @contextmanager
    def start(
        devices: int = 1,
        *,
        await_live: bool = True,
        routers: int = 1,
        host: str = "t",
        faults: Path | None = None,
        environs: Mapping[str, Mapping[str, str]] | None = None,
        **options: Any,
    ) -> Iterator[LocalFleet]:
        chosen = replace(Settings(broker_url=server), **(BRISK | options))
        with local_fleet(
            chosen, client, tmp_path, devices=devices, routers=routers, host=host,
            faults=faults, environs=environs, await_live=await_live,
        ) as fleet:  # fmt: skip
            yield fleet

    return start


@pytest.fixture(scope="module")
def _shared_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    """Run two simulated devices on a server of their own, which no test stops or flushes."""
    folder = tmp_path_factory.mktemp("shared-fleet")
    with embedded_server() as address, redis.Redis.from_url(address) as client:
        options = replace(Settings(broker_url=address), **BRISK)
        with local_fleet(options, client, folder, devices=2, host="shared") as fleet:
            yield fleet


@pytest.fixture
def fleet(_shared_fleet: LocalFleet) -> Iterator[LocalFleet]:
    """Give the fleet that the tests of a module share: for those that neither hurt nor configure it.

    The test must leave nothing there but what expires.
    """
    client = _shared_fleet.client
    before = set(_lasting(client))
    with environment(SUTRA_BROKER_URL=str(_shared_fleet.options.broker_url)):
        yield _shared_fleet
    try:
        # A worker acknowledges with its next take, up to 100 ms later.
        conftest.wait_until(lambda: set(_lasting(client)) <= before)
    finally:
        if left := set(_lasting(client)) - before:
            client.delete(*left)


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


@contextmanager
def streamed(client: redis.Redis) -> Iterator[Stream]:
    """Give a stream, and take from the server what lasts of it by design."""
    one = Stream(client)
    try:
        yield one
    finally:
        client.delete(keys.streams(), *(one.key(part) for part in ("in", "closed", "out", "dead")))


@pytest.fixture
def stream(request: pytest.FixtureRequest) -> Iterator[Stream]:
    """Give a stream that ends with the test, on the server of the fleet that the test uses."""
    shared = "fleet" in request.fixturenames
    client = request.getfixturevalue("fleet").client if shared else request.getfixturevalue("client")
    with streamed(client) as one:
        yield one


@pytest.fixture
def durable(server: str, tmp_path: Path) -> Iterator[tuple[DurableServer, redis.Redis]]:
    """Run a durable server for one test, and make this process its client."""
    one = DurableServer(tmp_path)
    one.start()
    try:
        with (
            environment(SUTRA_BROKER_URL=one.address),
            clean(redis.Redis.from_url(one.address)) as client,
        ):
            yield one, client
    finally:
        one.stop()
