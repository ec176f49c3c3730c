"""Deaths, disconnects and absences: what was sent is answered, or fails clearly."""

import os
import signal
import time

import numpy as np
import pytest
from celery.exceptions import TaskRevokedError

from sutra_tasks import NoHealthyWorkersError, embed
from sutra_tasks.engines.simulated_engine import vectors_of


def check(results, texts, timeout=60):
    got = np.vstack([result.get(timeout=timeout) for result in results])
    assert np.allclose(got, vectors_of(texts, 384), atol=1e-6)


def test_without_a_device_work_waits_visibly_then_fails_with_the_facts(start_fleet, wait_until):
    with start_fleet(0, no_device_wait_s=2.0, await_live=False) as fleet:
        result = embed.delay("anyone there?")
        wait_until(lambda: [r["waiting"] for r in fleet.status().routers] == [1])
        with pytest.raises(NoHealthyWorkersError) as failed:
            result.get(timeout=20)
        assert failed.value.known == 0
        assert failed.value.oldest_heartbeat_s is None
        assert failed.value.waited_s >= 2
        assert "sutra up" in str(failed.value)


def test_a_message_that_expires_while_it_waits_is_revoked(start_fleet):
    with start_fleet(0, await_live=False), pytest.raises(TaskRevokedError):
        embed.apply_async(("anyone?",), expires=1).get(timeout=20)


def test_what_waited_is_served_when_a_device_comes(start_fleet, wait_until):
    with start_fleet(0, await_live=False) as fleet:
        texts = [f"early {i}" for i in range(300)]
        results = [embed.delay(text) for text in texts]
        wait_until(lambda: fleet.status().routers and fleet.status().routers[0]["waiting"] > 0)
        with start_fleet(1):
            check(results, texts)


def test_a_killed_device_is_back_and_every_task_completes(start_fleet, wait_until):
    with start_fleet(2, simulated_fixed_s=0.02) as fleet:
        texts = [f"text {i}" for i in range(600)]
        results = [embed.delay(text) for text in texts]
        victim = fleet.device_ids[0]
        killed = fleet.pid(victim)
        wait_until(lambda: any(d.held for d in fleet.status().devices if d.id == victim))
        began = time.monotonic()
        os.kill(killed, signal.SIGKILL)
        check(results, texts)
        wait_until(lambda: victim in fleet.live() and fleet.pid(victim) != killed, within_s=15)
        assert time.monotonic() - began < 15
        assert any("signal 9" in report for report in fleet.reports)


def test_a_killed_router_loses_nothing(start_fleet):
    with start_fleet(1) as fleet:
        texts = [f"text {i}" for i in range(1500)]
        results = [embed.delay(text) for text in texts[:1000]]
        os.kill(fleet.pid("router"), signal.SIGKILL)
        results += [embed.delay(text) for text in texts[1000:]]
        check(results, texts)


def test_twenty_lost_connections_lose_nothing(start_fleet, client, wait_until):
    with start_fleet(1) as fleet:
        for turn in range(20):
            texts = [f"turn {turn} text {i}" for i in range(20)]
            results = [embed.delay(text) for text in texts]
            own = client.client_id()
            for connection in client.client_list(_type="normal"):
                # A worker waits on its queue with BLMOVE or takes with EVAL.
                if connection["id"] != str(own) and connection["cmd"] in ("blmove", "eval"):
                    client.client_kill_filter(_id=connection["id"])
            check(results, texts)
        assert fleet.reports == []  # they reconnected; nothing had to be restarted
        # A reply lost with its connection is computed twice; let the second run end, too.
        wait_until(
            lambda: (
                fleet.status().queued == 0
                and not any(d.held or d.queued for d in fleet.status().devices)
            )
        )


def test_a_drained_device_finishes_or_hands_back(start_fleet):
    with start_fleet(2, simulated_fixed_s=0.05, batch_texts=4) as fleet:
        texts = [f"text {i}" for i in range(400)]
        results = [embed.delay(text) for text in texts]
        os.kill(fleet.pid(fleet.device_ids[0]), signal.SIGTERM)
        check(results, texts)
