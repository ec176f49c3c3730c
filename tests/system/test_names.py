"""Fleets that share a server, by accident or by namespace, do not disturb each other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sutra_tasks import keys
from sutra_tasks.client.embed_task import embed
from tests.system.conftest import OF_THE_FLEET

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import redis

ROOT = Path(__file__).parents[2]
START_S = 60.0
BRISK = {
    "SUTRA_ENGINE": "simulated",
    "SUTRA_HEARTBEAT_S": "0.2",
    "SUTRA_DEVICE_TTL_S": "2",
    "SUTRA_LEASE_S": "4",
}
CALLS = """
from sutra_tasks import embed
print(sum(embed.delay("text").get(timeout=60).shape[0] for _ in range(20)))
"""


@pytest.fixture
def start(
    server: str, client: redis.Redis, tmp_path: Path
) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start a process of ours; all are ended by SIGTERM when the test ends."""
    started: list[subprocess.Popen[bytes]] = []

    def start_one(*command: str, **environ: str) -> subprocess.Popen[bytes]:
        with (tmp_path / f"{len(started)}.log").open("wb") as log:
            one = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT, env={**os.environ, **BRISK, "SUTRA_BROKER_URL": server, **environ},
                stdout=log, stderr=log, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        started.append(one)
        return one

    yield start_one
    for one in started:
        one.terminate()
    try:
        for one in started:
            one.wait(timeout=60)
    finally:
        for one in started:  # a worker that is left would take part in the tests that follow
            one.kill()
            one.wait()
    for key in client.scan_iter():
        namespace, _, rest = key.partition(b":")
        if namespace in (b"staging", b"production") and rest.startswith(OF_THE_FLEET):
            client.delete(key)


def said(folder: Path, number: int) -> str:
    return (folder / f"{number}.log").read_text(errors="replace")


def live(client: redis.Redis) -> set[str]:
    """Return the devices that have sent a heartbeat and not left."""
    found: Any = client.zrange(keys.fleet(), 0, -1)
    return {one.decode() for one in found}


def routers(client: redis.Redis) -> set[str]:
    records: list[Any] = [client.get(name) for name in client.scan_iter(keys.router("*"))]
    return {json.loads(one)["name"].partition("@")[0] for one in records if one is not None}


def test_two_fleets_of_one_machine_serve_side_by_side(
    client: redis.Redis, start: Callable[..., Any], tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    up = ("-c", "from sutra_tasks.cli import main; main()", "up", "--devices", "1")
    first = start(*up)
    wait_until(lambda: "Ctrl-C stops" in said(tmp_path, 0), within_s=START_S)
    second = start(*up)
    wait_until(lambda: "Ctrl-C stops" in said(tmp_path, 1), within_s=START_S)
    assert len(live(client)) == 2
    wait_until(lambda: routers(client) == {"router", "router-2"}, within_s=START_S)
    for _ in range(20):
        assert embed.delay("text").get(timeout=20).shape == (384,)
    assert (first.poll(), second.poll()) == (None, None)
    assert "restarting" not in said(tmp_path, 0) + said(tmp_path, 1)


def test_a_device_whose_name_a_live_worker_has_is_refused_in_one_sentence(
    client: redis.Redis, start: Callable[..., Any], tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    device = ("-m", "celery", "-A", "workers.device", "worker", "--loglevel=warning")
    first = start(*device, SUTRA_DEVICE_ID="gpu0")
    wait_until(lambda: live(client) == {"gpu0"}, within_s=START_S)
    second = start(*device, SUTRA_DEVICE_ID="gpu0")
    assert second.wait(timeout=START_S) != 0
    assert "a live worker has the name gpu0 already" in said(tmp_path, 1)
    assert "Traceback" not in said(tmp_path, 1)
    assert first.poll() is None
    # One that was killed is followed by another under its name.
    first.send_signal(signal.SIGKILL)
    first.wait()
    third = start(*device, SUTRA_DEVICE_ID="gpu0")
    taken: list[Any] = [client.get(keys.worker("gpu0"))]
    wait_until(lambda: client.get(keys.worker("gpu0")) != taken[0], within_s=START_S)
    wait_until(lambda: live(client) == {"gpu0"}, within_s=START_S)
    assert third.poll() is None


def test_roles_that_are_started_under_one_node_name_live_side_by_side(
    client: redis.Redis, start: Callable[..., Any], tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    (tmp_path / "models").mkdir()
    router = start("-m", "celery", "-A", "workers.router", "worker", "--loglevel=warning")
    wait_until(lambda: routers(client) == {"celery"}, within_s=START_S)
    distiller = start(
        "-m", "celery", "-A", "workers.distill", "worker", "--loglevel=warning",
        SUTRA_MODELS_DIR=str(tmp_path / "models"),
    )  # fmt: skip
    wait_until(lambda: client.hlen(keys.leases()) == 2, within_s=START_S)

    def beats() -> dict[bytes, int]:
        counts: Any = client.hgetall(keys.leases())
        return {name: int(count) for name, count in counts.items()}

    before = beats()
    wait_until(lambda: all(beats().get(one, 0) > count + 2 for one, count in before.items()))
    assert (router.poll(), distiller.poll()) == (None, None)


def test_fleets_of_two_namespaces_share_a_server_and_nothing_else(
    client: redis.Redis,
    start: Callable[..., Any],
    tmp_path: Path,
    run_python: Callable[..., str],
    wait_until: Callable[..., None],
) -> None:
    up = ("-c", "from sutra_tasks.cli import main; main()", "up", "--devices", "1")
    for number, name in enumerate(("staging", "production")):
        start(*up, SUTRA_NAMESPACE=name)
        wait_until(lambda: "Ctrl-C stops" in said(tmp_path, number), within_s=START_S)  # noqa: B023
    for name in ("staging", "production"):
        assert run_python(CALLS, SUTRA_NAMESPACE=name).split() == [str(20 * 384)]
        found: Any = client.zcard(f"{name}:sutra:fleet")
        assert found == 1
    names = [one.decode() for one in client.scan_iter()]
    assert not [one for one in names if not one.startswith(("staging:", "production:"))]
