"""What waits: whom it goes before, when it is given up, who may join in, and how much may wait."""

import json
import os
import subprocess
import sys
from collections import deque
from pathlib import Path

import pytest
from celery.exceptions import TaskRevokedError

from sutra_tasks import FleetSaturated, embed, keys
from sutra_tasks.app import app
from sutra_tasks.health.states import DeviceState
from tests.system.conftest import environment
from tests.system.faulty_device import COMPUTED
from tests.system.local_fleet import frozen
from tests.system.work import Work

SUTRA = Path(sys.executable).with_name("sutra")
LONG = "word " * 500
WORDS = " and so on and on" * 4
"""Makes a text weigh some thirty tokens."""

SLOW = {"simulated_per_token_s": 0.0005}
"""A device that does some ninety of those a second, and is given forty ahead of time."""


def test_what_is_revoked_or_expires_in_the_batcher_is_not_computed(
    start_fleet, client, tmp_path, wait_until
):
    with start_fleet(1, faults=tmp_path, simulated_per_token_s=0.003) as fleet:
        (device,) = fleet.device_ids
        computed = tmp_path / COMPUTED
        work = Work(client)
        work.send([f"first {LONG}"])  # 1.5 seconds, in which the others wait
        wait_until(lambda: "first" in computed.read_text())
        work.send((f"revoked {n}" for n in range(20)), error=TaskRevokedError)
        work.send((f"expired {n}" for n in range(20)), error=TaskRevokedError, expires=1.0)
        work.send(f"wanted {n}" for n in range(5))
        wait_until(lambda: fleet.device(device).record.waiting_texts == 45)
        app.control.revoke([result.id for text, result in work.sent.items() if "revoked" in text])
        assert "wanted" not in computed.read_text()
        work.check()
        assert "revoked" not in computed.read_text()
        assert "expired" not in computed.read_text()


def test_interactive_work_goes_before_a_bulk_backlog(start_fleet, client):
    with start_fleet(1, **SLOW) as fleet:
        bulk, interactive = Work(client), Work(client)
        with frozen(*map(fleet.pid, fleet.router_names)):  # or a slow sender would be overtaken
            bulk.send((f"bulk {n}{WORDS}" for n in range(300)), priority=9)
            interactive.send((f"interactive {n}{WORDS}" for n in range(20)), priority=0)
        interactive.check()
        assert sum(result.ready() for result in bulk.sent.values()) < 150
        bulk.check()
        assert fleet.reports == []


def test_bulk_gets_its_turn_in_a_permanent_stream_of_interactive_work(start_fleet, client):
    with start_fleet(1, **SLOW) as fleet:
        bulk, interactive = Work(client), Work(client)
        interactive.send((f"interactive {n}{WORDS}" for n in range(300)), priority=0)
        under_way = deque(interactive.sent.values())
        bulk.send((f"bulk {n}{WORDS}" for n in range(16)), priority=9)
        while not all(result.ready() for result in bulk.sent.values()):
            assert len(interactive.sent) < 2000
            under_way.popleft().get(timeout=30)
            text = f"interactive {len(interactive.sent)}{WORDS}"
            interactive.send([text], priority=0)
            under_way.append(interactive.sent[text])
            assert client.llen(keys.EMBED_QUEUE) > 0  # it never runs dry
        bulk.check()
        interactive.check()
        assert fleet.reports == []


def test_a_fleet_with_too_much_to_do_refuses_calls(start_fleet, client, server, wait_until):
    with start_fleet(1, **SLOW):
        wait_until(lambda: json.loads(client.get(keys.backlog()))["tokens_per_s"])
        with environment(SUTRA_BROKER_URL=server, SUTRA_MAX_QUEUE_S="1"):
            accepted = Work(client)
            with pytest.raises(FleetSaturated) as refused:
                accepted.send(f"text {n}{WORDS}" for n in range(1000))
            assert refused.value.backlog_tokens > 0
            assert refused.value.retry_after_s >= 0
            assert len(accepted.sent) < 500  # a second's work, and what was sent unnoticed
            accepted.check()

            def admitted() -> bool:
                try:
                    embed.delay("later").get(timeout=30)
                except FleetSaturated:
                    return False
                return True

            wait_until(admitted)


def test_a_device_with_another_model_is_refused_and_shown(start_fleet, client, server, wait_until):
    with (
        start_fleet(1) as fleet,
        start_fleet(1, routers=0, host="other", simulated_width=128, await_live=False) as others,
    ):
        (stranger,) = others.device_ids
        wait_until(
            lambda: DeviceState.REFUSED in {d.state for d in fleet.status().devices if d.id == stranger}
        )
        work = Work(client)
        work.send(f"text {n}" for n in range(500))
        work.check()
        assert fleet.device(stranger).record.tasks == 0
        shown = subprocess.run(
            [SUTRA, "status"],
            env={**os.environ, "SUTRA_BROKER_URL": server},
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        assert "refused" in shown
        assert "simulated-1:128" in shown
