"""A server that restarts, pauses or is full, with 2,000 tasks under way: each ends as it must."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import psutil
import pytest
import redis

from sutra_tasks.fleet.server import embedded_server, free_port
from sutra_tasks.settings import Settings
from tests.system.conftest import BRISK, clean, environment
from tests.system.local_fleet import LocalFleet, local_fleet
from tests.system.work import LOADED, Work


class DurableServer:
    """A server that finds what the one before it stored."""

    def __init__(self, folder) -> None:
        self.port = free_port()
        # Written before it is answered, and what is written outlives the process, if not the machine.
        self._options = ["--appendonly", "yes", "--appendfsync", "no", "--dir", str(folder)]
        self._running = ExitStack()

    def start(self) -> str:
        return self._running.enter_context(embedded_server(self.port, *self._options))

    def stop(self) -> None:
        self._running.close()

    def kill(self, client: redis.Redis) -> None:
        psutil.Process(client.info("server")["process_id"]).kill()
        self.stop()


@pytest.fixture
def durable(server, tmp_path) -> Iterator[tuple[DurableServer, redis.Redis]]:
    """Run a durable server for one test, and make this process its client."""
    one = DurableServer(tmp_path)
    address = one.start()
    try:
        with environment(SUTRA_BROKER_URL=address), clean(redis.Redis.from_url(address)) as client:
            yield one, client
    finally:
        one.stop()


Run = Callable[..., LocalFleet]


@contextmanager
def run(client: redis.Redis, port: int, folder, **options) -> Iterator[LocalFleet]:
    address = f"redis://127.0.0.1:{port}/0"
    chosen = replace(Settings(broker_url=address), **(BRISK | LOADED | options))
    with local_fleet(chosen, client, folder, devices=2, routers=2) as fleet:
        yield fleet


@pytest.mark.parametrize("how", ["in order", "killed"])
def test_the_server_restarts(durable, tmp_path, how):
    server, client = durable
    with run(client, server.port, tmp_path) as fleet:
        work = Work(client)
        work.fill(fleet)
        if how == "killed":
            server.kill(client)
        else:
            server.stop()
        server.start()
        work.check()
        assert fleet.reports == []  # all reconnected; nobody was replaced


def test_the_server_pauses(start_fleet, client, wait_until):
    with start_fleet(2, routers=2, device_ttl_s=1.0, **LOADED) as fleet:
        incarnations = [fleet.incarnation(name) for name in fleet.device_ids]
        work = Work(client)
        work.fill(fleet)
        client.client_pause(4000)
        work.check()
        wait_until(fleet.is_whole)
        assert [fleet.incarnation(name) for name in fleet.device_ids] == incarnations
        assert fleet.reports == []


def test_the_server_is_full(start_fleet, client, wait_until):
    with start_fleet(2, routers=2, **LOADED) as fleet:
        work = Work(client)
        work.fill(fleet)
        client.config_set("maxmemory", "1")
        try:
            wait_until(lambda: fleet.log.read_text().count("goes back to its queue") > 100)
        finally:
            client.config_set("maxmemory", "0")
        work.check()
        assert fleet.reports == []
