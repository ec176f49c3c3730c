"""A server's password is in no list of processes, no log, and nothing that a command prints."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import redis

from sutra_tasks.host.embedded_server import find_binary, free_port
from sutra_tasks.host.processes import spawn, stop
from sutra_tasks.membership.fleet import fleet_members
from tests.conftest import wait_until
from tests.system.conftest import ROOT

PYTHON = sys.executable
SUTRA = str(Path(sys.executable).with_name("sutra"))
SECRET = "open-sesame-4711"
CELERY = (PYTHON, "-m", "celery", "-A")


def answers(client):
    try:
        return client.ping()
    except redis.RedisError:
        return False


@pytest.fixture
def guarded(tmp_path):
    """Run a server with a password; give its address."""
    config = tmp_path / "server.conf"
    port = free_port()
    config.write_text(f"port {port}\nrequirepass {SECRET}\nsave ''\ndir {tmp_path}\nbind 127.0.0.1\n")
    server = spawn([find_binary(), str(config)], output=subprocess.DEVNULL)
    address = f"redis://:{SECRET}@127.0.0.1:{port}/0"
    try:
        with redis.Redis.from_url(address) as client:
            wait_until(lambda: answers(client))
        yield address
    finally:
        stop(server, 5)


def test_a_password_is_seen_nowhere(guarded, tmp_path):
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SUTRA_")}
    environ |= {"SUTRA_BROKER_URL": guarded, "TMPDIR": str(tmp_path)}
    log = tmp_path / "said.log"
    flower_port = free_port()
    plain = {**environ, "SUTRA_ENGINE": "simulated"}
    device = {**plain, "SUTRA_DEVICE_ID": "plain"}
    commands = {
        "up": (
            (SUTRA, "up", "--engine", "simulated", "--devices", "1", "--log-level", "debug"),
            environ,
        ),
        # As docker-compose.yml and the README start them, with Celery's banner.
        "router": ((*CELERY, "workers.router", "worker", "-l", "debug", "-n", "second@%h"), plain),
        "device": ((*CELERY, "workers.device", "worker", "-l", "debug"), device),
        "flower": (
            (*CELERY, "sutra_tasks", "flower", f"--port={flower_port}", "--logging=debug"),
            plain,
        ),
        "beat": ((*CELERY, "sutra_tasks", "beat", "-l", "debug", f"--schedule={tmp_path}/beat"), plain),
    }
    running = []
    with log.open("wb") as said, redis.Redis.from_url(guarded) as client:
        try:
            for command, given in commands.values():
                running.append(subprocess.Popen(command, env=given, stdout=said, stderr=said, cwd=ROOT))
            wait_until(lambda: "Ctrl-C stops" in log.read_text(), within_s=90)
            wait_until(lambda: sum(one.takes_work for one in fleet_members(client)) == 2, within_s=90)
            wait_until(lambda: "Visit me" in log.read_text(), within_s=90)
            for command in (
                (SUTRA, "status"), (SUTRA, "health"), (SUTRA, "embed", "x"),
                (*CELERY, "sutra_tasks", "inspect", "conf"), (*CELERY, "workers.router", "report"),
            ):  # fmt: skip
                subprocess.run(
                    command, env=plain, stdout=said, stderr=said, cwd=ROOT, check=False, timeout=40
                )
            for one in psutil.process_iter(["cmdline"]):
                assert SECRET not in " ".join(one.info["cmdline"] or ())
            plain["SUTRA_BROKER_URL"] = guarded.replace(SECRET, f"wrong-{SECRET}")
            for command in ((SUTRA, "status"), (SUTRA, "embed", "x"), (SUTRA, "health")):
                subprocess.run(command, env=plain, stdout=said, stderr=said, cwd=ROOT, check=False)
        finally:
            for one in running:
                one.terminate()
            for one in running:
                one.wait(30)
    text = log.read_text()
    assert "refuses the login" in text
    assert SECRET not in text, [line for line in text.splitlines() if SECRET in line][:5]
