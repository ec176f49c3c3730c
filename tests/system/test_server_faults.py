"""A server that restarts, pauses or is full, with 1,200 tasks under way: each ends as it must."""

from dataclasses import replace

import pytest

from sutra_tasks.settings import Settings
from tests.system.conftest import BRISK
from tests.system.local_fleet import local_fleet
from tests.system.work import LOADED, Work


@pytest.mark.parametrize("how", ["in order", "killed"])
def test_the_server_restarts(durable, tmp_path, how):
    server, client = durable
    options = replace(Settings(broker_url=server.address), **(BRISK | LOADED))
    with local_fleet(options, client, tmp_path, devices=2, routers=2) as fleet:
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
        wait_until(fleet.all_serve)
        assert [fleet.incarnation(name) for name in fleet.device_ids] == incarnations
        assert fleet.reports == []


def test_the_server_is_full(start_fleet, client, wait_until):
    with start_fleet(2, routers=2, **LOADED) as fleet:
        work = Work(client)
        work.fill(fleet)
        client.config_set("maxmemory", "1")
        try:
            wait_until(lambda: fleet.log.read_text().count("is requeued") > 100)
        finally:
            client.config_set("maxmemory", "0")
        work.check()
        assert fleet.reports == []
