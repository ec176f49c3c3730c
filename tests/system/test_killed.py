"""Workers that die or stand still, with 1,200 tasks under way: each task ends as it must."""

import json
import os
import signal
from collections import Counter

import pytest

from sutra_tasks import keys
from sutra_tasks.app import app
from sutra_tasks.broker.queues import lanes
from tests.conftest import wait_until
from tests.system.faulty_device import COMPUTED
from tests.system.local_fleet import frozen
from tests.system.work import IN_FLIGHT, LOADED, Work, tasks_in_flight

CALLBACKS = "callbacks"


def test_a_device_is_killed_while_it_computes(start_fleet, client, wait_until):
    link = app.signature("host.count").set(queue=CALLBACKS)
    with start_fleet(3, **LOADED) as fleet:
        work = Work(client, options={"link": link})
        work.fill(fleet)
        victim = fleet.device_ids[0]
        pid = fleet.pid(victim)
        wait_until(lambda: fleet.device(victim).held)
        with frozen(pid):
            held = tasks_in_flight(client, fleet.incarnation(victim))
            os.kill(pid, signal.SIGKILL)
        assert held
        assert work.in_flight() >= IN_FLIGHT - len(held)
        work.check()
        fleet.await_replacement(victim, pid)
        assert [line for line in fleet.reports if "signal 9" in line]
    sent = [json.loads(message)["headers"]["parent_id"] for message in client.lrange(CALLBACKS, 0, -1)]
    client.delete(CALLBACKS)
    assert set(sent) == work.ids()
    assert {task for task, times in Counter(sent).items() if times > 1} <= held


def test_a_device_is_killed_while_it_idles_before_a_full_queue(start_fleet, client):
    with start_fleet(2, device_ttl_s=30, lease_s=30, **LOADED) as fleet:
        victim = fleet.device_ids[0]
        pid = fleet.pid(victim)
        work = Work(client)
        with frozen(pid):
            work.send((f"past the router {n}" for n in range(500)), queue=keys.device_queue(victim))
            work.fill(fleet)
            wait_until(lambda: fleet.device(victim).queued > 500)
            os.kill(pid, signal.SIGKILL)
        work.check()
        fleet.await_replacement(victim, pid)


def test_all_devices_are_killed_at_once(start_fleet, client):
    with start_fleet(2, **LOADED) as fleet:
        work = Work(client)
        work.fill(fleet)
        pids = {name: fleet.pid(name) for name in fleet.device_ids}
        for pid in pids.values():
            os.kill(pid, signal.SIGKILL)
        work.check()
        for name, pid in pids.items():
            fleet.await_replacement(name, pid)


def test_one_router_of_two_is_killed_and_then_both(start_fleet, client):
    with start_fleet(2, routers=2, **LOADED) as fleet:
        work = Work(client)
        for victims in (fleet.router_names[1:], fleet.router_names):
            work.fill(fleet)
            pids = {name: fleet.pid(name) for name in victims}
            for pid in pids.values():
                os.kill(pid, signal.SIGKILL)
            work.send(f"meanwhile {victims} {n}" for n in range(100))
            for name, pid in pids.items():
                fleet.await_replacement(name, pid)
        work.check()


def test_both_reapers_are_killed_half_way(start_fleet, client):
    with start_fleet(2, routers=2, **LOADED) as fleet:
        victim = fleet.device_ids[0]
        lost, queue = fleet.pid(victim), keys.device_queue(victim)
        incarnation = fleet.incarnation(victim)
        work = Work(client)
        work.fill(fleet)
        with frozen(lost):
            with frozen(
                *map(fleet.pid, fleet.router_names)
            ):  # or the lease might end while they are sent
                work.send((f"to the lost one {n}" for n in range(1000)), queue=queue)
            before = waiting = client.llen(queue)
            while waiting >= before:  # a poll that slept would miss the moment
                before, waiting = waiting, client.llen(queue)
            client.client_pause(5000, all=False)
            pids = {name: fleet.pid(name) for name in fleet.router_names}
            for pid in pids.values():
                os.kill(pid, signal.SIGKILL)
            assert client.llen(queue) > 0
            client.client_unpause()
            for name, pid in pids.items():
                fleet.await_replacement(name, pid)
            fleet.await_lease_end(incarnation)
            assert not any(client.llen(lane) for lane in lanes(queue))
            work.check()
        fleet.await_replacement(victim, lost)


@pytest.mark.parametrize("late", ["before", "after"])
def test_a_device_that_only_stood_still_changes_no_result(
    start_fleet, client, tmp_path, wait_until, late
):
    with start_fleet(2, faults=tmp_path, **LOADED) as fleet:
        victim = fleet.device_ids[0]
        pid, incarnation = fleet.pid(victim), fleet.incarnation(victim)
        raises_there = f"!raise@{victim} " + "word " * 400
        work = Work(client)
        work.fill(fleet)
        work.send([raises_there], queue=keys.device_queue(victim))
        wait_until(lambda: raises_there in (tmp_path / COMPUTED).read_text())
        with frozen(pid):
            assert work.in_flight() >= IN_FLIGHT
            assert work.sent[raises_there].id in tasks_in_flight(client, incarnation)
            fleet.await_lease_end(incarnation)
            if late == "after":
                wait_until(work.sent[raises_there].ready)
            # It may take these before it hears that it is replaced: their errors do not count either.
            more = [f"!raise@{victim} taken late {n}" for n in range(20)]
            work.send(more, queue=keys.device_queue(victim))
        fleet.await_replacement(victim, pid)
        work.check()
        assert "the lease of this worker ended" in fleet.log.read_text()  # it did fail, there
        assert f"{victim} ended with status 0" in "\n".join(fleet.reports)


def test_a_router_that_only_stood_still_changes_no_result(start_fleet, client):
    with start_fleet(2, routers=2, **LOADED) as fleet:
        work = Work(client)
        work.fill(fleet)
        victim = fleet.router_names[0]
        pid, incarnation = fleet.pid(victim), fleet.incarnation(victim)
        with frozen(pid):
            fleet.await_lease_end(incarnation)
            work.fill(fleet)
        fleet.await_replacement(victim, pid)
        work.check()


def test_a_rolling_restart_under_load_loses_and_fails_nothing(start_fleet, client):
    with start_fleet(2, **LOADED) as fleet:
        work = Work(client)
        for victim in fleet.device_ids:
            work.fill(fleet)
            pid, incarnation = fleet.pid(victim), fleet.incarnation(victim)
            with fleet.lock:
                os.kill(pid, signal.SIGTERM)
                fleet.await_end(pid)
                # Nothing is left for which its end could be blamed.
                assert not tasks_in_flight(client, incarnation)
            fleet.await_replacement(victim, pid)
        work.check()
        assert all("status 0;" in report for report in fleet.reports)
