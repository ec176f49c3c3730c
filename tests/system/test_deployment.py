"""docker-compose.yml, checked without Docker: every service's command runs as a local process."""

import os
import pty
import re
import shlex
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import yaml

from sutra_tasks import embed
from sutra_tasks.host.embedded_server import find_binary, free_port
from sutra_tasks.host.processes import spawn, stop
from sutra_tasks.membership.fleet import fleet_members

EXECUTE = "os.execv(sys.argv[1], sys.argv[1:])"
ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES = COMPOSE["services"]


def command(name):
    words = shlex.split(SERVICES[name]["command"])
    if words[0] in ("celery", "python"):
        return [sys.executable, "-m", "celery", *words[1:]] if words[0] == "celery" else [
            sys.executable, *words[1:]
        ]  # fmt: skip
    return words


def environment(name, server, **more):
    described = SERVICES[name].get("environment", {})
    given = {k: str(v) for k, v in described.items() if v is not None}
    given |= {"SUTRA_BROKER_URL": server, "SUTRA_ENGINE": "simulated", "SUTRA_HEARTBEAT_S": "0.2"}
    given.pop("SUTRA_MODEL", None)
    return {**os.environ, **given, **more}


@pytest.fixture
def service(server, client, tmp_path):
    running = []

    def start(name, *, words=None, **more):
        log = (tmp_path / f"{name}.log").open("wb")
        running.append(
            spawn(words or command(name), environ=environment(name, server, **more), output=log)
        )
        log.close()
        return running[-1]

    yield start
    for process in reversed(running):
        stop(process, 20)


def test_every_worker_waits_for_redis_and_has_time_to_drain():
    for name, described in SERVICES.items():
        if name != "redis":
            assert described["depends_on"]["redis"]["condition"] == "service_healthy"
            assert described["stop_grace_period"] == "30s"
            assert described["restart"] == "unless-stopped"


def test_a_container_has_an_init_and_volumes_that_the_images_user_can_write():
    steps = (ROOT / "Dockerfile").read_text().splitlines()
    user = next(line.split()[1] for line in steps if line.startswith("USER "))
    made = next(line for line in steps if f"chown {user}" in line)
    for name, described in SERVICES.items():
        if name == "redis":
            continue
        assert described["init"] is True
        for volume in described["volumes"]:
            source, folder, *mode = volume.split(":")
            if mode != ["ro"]:
                assert source in COMPOSE["volumes"]
                assert folder in made.split(f"chown {user}")[1].split(), name


def test_the_image_has_what_its_services_need():
    (installed,) = re.findall(r'pip install "\.\[([a-z,]+)\]"', (ROOT / "Dockerfile").read_text())
    assert {"worker", "distill", "flower"} <= set(installed.split(","))


def test_each_gpu_has_a_service_with_its_own_name_and_device():
    gpus = [name for name in SERVICES if name.startswith("device-gpu")]
    reserved = [
        SERVICES[name]["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"][0]
        for name in gpus
    ]
    assert reserved == [str(index) for index in range(len(gpus))]
    assert [SERVICES[name]["environment"]["SUTRA_DEVICE_ID"] for name in gpus] == [
        name.removeprefix("device-") for name in gpus
    ]


def test_nothing_is_published_beyond_loopback():
    for described in SERVICES.values():
        assert all(port.startswith("127.0.0.1:") for port in described.get("ports", []))


def test_the_services_commands_serve_together(service, client, wait_until):
    services = [name for name in SERVICES if name not in ("redis", "flower")]
    running = {name: service(name, OMP_NUM_THREADS="1") for name in services}
    wait_until(lambda: len(fleet_members(client)) >= 4, within_s=60)  # gpu0, gpu1, and two of this host
    assert embed.delay(["a", "b"]).get(timeout=30).shape == (2, 384)
    assert {name: process.poll() for name, process in running.items()} == dict.fromkeys(services)
    assert {s.id for s in fleet_members(client)} >= {"gpu0", "gpu1"}


def test_flower_shows_the_fleets_workers_and_tasks(service, client, wait_until):
    port = free_port()
    words = [w if not w.startswith("--port") else f"--port={port}" for w in command("flower")]
    words = [w if not w.startswith("--address") else "--address=127.0.0.1" for w in words]
    service("flower", words=words, FLOWER_UNAUTHENTICATED_API="true")
    service("router")
    service("device-gpu0")

    def get(path):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
                return answer.read().decode()
        except OSError:
            return ""

    known = "/api/workers?refresh=true"
    wait_until(lambda: "gpu0@" in get(known) and "router@" in get(known), within_s=60)
    result = embed.delay("private words")
    result.get(timeout=30)
    info = f"/api/task/info/{result.id}"
    wait_until(lambda: "SUCCESS" in get(info))
    assert "sutra.embed" in get(info)
    assert "1 texts, 13 bytes" in get(info)
    assert "private words" not in get(info) + get(f"/task/{result.id}")


def test_a_worker_in_a_terminal_serves_and_when_that_closes_drains_and_leaves(
    server, client, service, wait_until
):
    service("router")
    take = "import fcntl, os, sys, termios; fcntl.ioctl(1, termios.TIOCSCTTY, 0); " + EXECUTE
    words = ["celery", "--quiet", "-A", "workers.device", "worker"]
    environ = {"SUTRA_BROKER_URL": server, "SUTRA_ENGINE": "simulated", "SUTRA_DEVICE_ID": "closing"}
    master, slave = pty.openpty()
    worker = subprocess.Popen(
        [sys.executable, "-c", take, sys.executable, "-m", *words],
        env={**os.environ, **environ}, stdin=slave, stdout=slave, stderr=slave,
        start_new_session=True, cwd=ROOT,
    )  # fmt: skip
    os.close(slave)
    try:
        wait_until(lambda: any(one.takes_work for one in fleet_members(client)), within_s=60)
        # Without the options that turn off gossip, as people start it.
        assert embed.delay(["a", "b"]).get(timeout=30).shape == (2, 384)
        os.close(master)
        assert worker.wait(30) == 0
        assert fleet_members(client) == []
    finally:
        worker.kill()


def test_the_servers_options_are_ones_the_server_knows(tmp_path):
    words = command("redis")
    assert words[0] == "valkey-server"
    process = subprocess.Popen(
        [find_binary(), *words[1:], "--port", str(free_port()), "--dir", str(tmp_path)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if "Ready to accept connections" in line:
                break
        assert "Ready to accept" in said, said
    finally:
        process.terminate()
        process.communicate(timeout=10)
