"""A fleet that cannot start says why on the terminal, soon, and leaves nothing behind."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis

from sutra_tasks.host.embedded_server import embedded_server, find_binary, free_port
from sutra_tasks.host.processes import spawn, stop
from tests.conftest import wait_until
from tests.system.conftest import ROOT

SUTRA = str(Path(sys.executable).with_name("sutra"))
PLAIN = {name: value for name, value in os.environ.items() if not name.startswith("SUTRA_")}
SECRET = "opensesame"


@pytest.fixture
def up(tmp_path):
    """Run ``sutra up`` until it ends, and check that it leaves no file."""
    folder = tmp_path / "tmp"
    folder.mkdir()

    def run(*options, command=(SUTRA, "up"), **environ):
        began = time.monotonic()
        done = subprocess.run(
            [*command, *options], env={**PLAIN, "TMPDIR": str(folder), "HF_HUB_OFFLINE": "1", **environ},
            capture_output=True, text=True, timeout=90, check=False, cwd=ROOT,
        )  # fmt: skip
        assert [one for one in folder.iterdir() if one.name.startswith("sutra")] == []
        assert "Traceback" not in done.stderr
        return done, time.monotonic() - began

    return run


def last_line(done):
    return done.stderr.splitlines()[-1]


def answers(client):
    try:
        return client.ping()
    except redis.RedisError:
        return False


def broken_model(folder):
    folder.mkdir()
    (folder / "modules.json").write_text("[]")
    return str(folder)


def test_a_model_that_is_not_there_ends_the_command_with_its_reason(up):
    done, seconds = up("--devices", "2", "--model", "/nonexistent")
    assert done.returncode == 1
    assert re.search("^sutra: .*-cpu[01] cannot start: model /nonexistent: ", last_line(done))
    assert len(re.findall("cpu[01] cannot start:", done.stderr)) == 1
    assert seconds < 45  # on an idle machine it takes 2 to 5


def test_a_gpu_that_torch_cannot_use_ends_a_worker_with_a_sentence(up, server):
    environ = {"SUTRA_BROKER_URL": server, "SUTRA_DEVICE_ID": "gpu9", "SUTRA_TORCH_DEVICE": "cuda:9"}
    done, _ = up(command=(sys.executable, "-m", "sutra_tasks.roles", "device"), **environ)
    assert done.returncode == 78
    assert "gpu9 cannot start: " in last_line(done)
    assert "nvidia-smi" in last_line(done)


def test_ports_that_are_taken_are_named_before_anything_starts(up):
    with embedded_server() as address:
        port = address.rpartition(":")[2].partition("/")[0]
        done, _ = up("--engine", "simulated", "--port", port)
    assert done.returncode == 1
    assert f"port {port}: Address already in use" in last_line(done)
    assert f"SUTRA_BROKER_URL=redis://127.0.0.1:{port}/0" in last_line(done)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--broker", f"redis://:{SECRET}@127.0.0.1:1/0"), "does not answer"),
        (("--port", "99999"), "99999"),
        (("--log-level", "loud"), "loud"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(up, options, reason):
    done, _ = up("--engine", "simulated", *options)
    assert done.returncode in (1, 2)
    assert reason in done.stderr
    assert SECRET not in done.stderr + done.stdout


def test_a_results_server_that_is_away_and_a_wrong_password_are_named(up, tmp_path):
    port = free_port()
    command = [
        find_binary(),
        "--port",
        str(port),
        "--requirepass",
        SECRET,
        "--save",
        "",
        "--dir",
        tmp_path,
    ]
    server = spawn(list(map(str, command)), output=subprocess.DEVNULL)
    try:
        right, wrong = (
            f"redis://:{SECRET}@127.0.0.1:{port}/0",
            f"redis://:wrong{SECRET}@127.0.0.1:{port}/0",
        )
        options = ("--engine", "simulated")
        with redis.Redis.from_url(right) as client:
            wait_until(lambda: answers(client))
        refused, _ = up(*options, "--broker", wrong)
        assert re.search("--broker|SUTRA_BROKER_URL", last_line(refused))
        assert "refuses the login" in last_line(refused)
        away, _ = up(*options, "--broker", right, SUTRA_RESULT_URL="redis://127.0.0.1:1/0")
        assert "SUTRA_RESULT_URL does not answer" in last_line(away)
        assert SECRET not in refused.stderr + away.stderr
    finally:
        stop(server, 5)


def test_a_package_that_is_missing_is_named_with_its_extra(up, tmp_path):
    (tmp_path / "hide").mkdir()
    (tmp_path / "hide" / "psutil.py").write_text("raise ModuleNotFoundError(name='psutil')")
    done, _ = up("--engine", "simulated", "--devices", "1", PYTHONPATH=f"{tmp_path / 'hide'}:{ROOT}")
    assert done.returncode == 1
    assert "pip install 'sutra-tasks[worker]'" in last_line(done)


def test_a_worker_on_its_own_says_why_and_ends_with_a_status_of_its_own(up, server, tmp_path):
    model = broken_model(tmp_path / "broken")
    environ = {"SUTRA_BROKER_URL": server, "SUTRA_DEVICE_ID": "alone", "SUTRA_MODEL": model}
    celery = (sys.executable, "-m", "celery", "--quiet", "-A", "workers.device", "worker")
    alone, _ = up(command=celery, **environ)
    assert alone.returncode == 78
    assert re.search(f"^alone cannot start: model {model}: ", alone.stderr, re.MULTILINE)


def test_the_launcher_ends_with_the_reason(up, server):
    launcher = (sys.executable, "-m", "workers.launcher", "1")
    done, _ = up(command=launcher, SUTRA_BROKER_URL=server, SUTRA_MODEL="/nonexistent")
    assert done.returncode == 1
    assert "cannot start: model /nonexistent" in last_line(done)
