"""The command line as a person uses it."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from sutra_tasks.engines.simulated_engine import vectors_of

SUTRA = str(Path(sys.executable).with_name("sutra"))


def sutra(*arguments, stdin=None, **environ):
    return subprocess.run(
        [SUTRA, *arguments], env={**os.environ, **environ}, input=stdin,
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.fixture
def up(tmp_path, wait_until):
    """Run ``sutra up`` with its own server; give its process and the broker's address."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*options, ready=True):
        said = tmp_path / f"up{len(started)}.log"
        folder = tmp_path / "tmp"
        folder.mkdir(exist_ok=True)
        environ = {k: v for k, v in os.environ.items() if not k.startswith("SUTRA_")}
        with said.open("wb") as log:
            process = subprocess.Popen(
                [SUTRA, "up", "--engine", "simulated", *options],
                env={**environ, "TMPDIR": str(folder), "COLUMNS": "200"},
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        started.append(process)
        if ready:
            wait_until(lambda: "Ctrl-C stops" in said.read_text() or process.poll() is not None)
        found = re.search(r"SUTRA_BROKER_URL=(\S+)", said.read_text())
        return process, found.group(1) if found else None, folder, said

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
        process.wait(30)


def test_a_fleet_starts_serves_and_stops_without_a_trace(up):
    process, address, folder, said = up("--devices", "2")
    assert address is not None, said.read_text()
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) == 5  # server, router, two devices, beat
    shown = sutra("status", SUTRA_BROKER_URL=address)
    assert shown.returncode == 0
    assert shown.stdout.count("healthy") == 2
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    assert not [child for child in children if child.is_running()]
    assert list(folder.iterdir()) == []


def test_ctrl_c_while_starting_leaves_nothing(up, wait_until):
    process, _, folder, _ = up(ready=False)
    wait_until(lambda: len(psutil.Process(process.pid).children()) >= 2)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    assert not [child for child in children if child.is_running()]
    assert list(folder.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children of a parent's death")
def test_a_killed_supervisor_takes_its_children_along(up, wait_until):
    process, _, _, _ = up("--devices", "1")
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait(10)
    wait_until(lambda: not [c for c in children if c.is_running() and c.status() != "zombie"])


@pytest.mark.usefixtures("fleet")
def test_texts_from_arguments_files_and_pipes(tmp_path):
    shown = sutra("embed", "one text")
    assert shown.returncode == 0, shown.stderr
    line = json.loads(shown.stdout)
    assert line["index"] == 0
    assert np.allclose(line["vector"], vectors_of(["one text"], 384)[0], atol=1e-6)

    source = tmp_path / "texts.jsonl"
    source.write_text('{"text": "a"}\n\n"b"\n{"text": "c", "id": 7}\n')
    out = tmp_path / "vectors.npy"
    assert sutra("embed", str(source), "--out", str(out)).returncode == 0
    assert np.allclose(np.load(out), vectors_of(["a", "b", "c"], 384), atol=1e-6)

    lines = tmp_path / "vectors.jsonl"
    piped = sutra("embed", "-", "--out", str(lines), "--dimensions", "8", stdin="x\ny\n")
    assert piped.returncode == 0, piped.stderr
    assert [len(json.loads(row)["vector"]) for row in lines.read_text().splitlines()] == [8, 8]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [('{"text": "a"}\nnot json\n', ":2: not JSON"), ('{"words": "a"}\n', ":1: expected")],
)
@pytest.mark.usefixtures("fleet")
def test_a_bad_line_is_named_and_no_half_file_stays(tmp_path, content, complaint):
    source = tmp_path / "texts.jsonl"
    source.write_text(content)
    failed = sutra("embed", str(source), "--out", str(tmp_path / "out.npy"))
    assert failed.returncode == 1
    assert complaint in failed.stderr
    assert "Traceback" not in failed.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"texts.jsonl"}


@pytest.mark.parametrize(
    ("arguments", "status", "complaint"),
    [
        (("status",), 2, "SUTRA_BROKER_URL"),
        (("embed", "x"), 2, "sutra up"),
        (("embed", "nowhere.jsonl"), 1, "No such file"),
        (("embed", "x", "--out", "vectors.csv"), 1, ".npy or .jsonl"),
        (("up", "--broker", "amqp://me:secret@host"), 2, "redis://"),
        (("up", "--devices", "0"), 2, "--devices"),
        (("up", "--engine", "steam"), 2, "steam"),
    ],
)
def test_mistakes_get_one_clear_line(arguments, status, complaint):
    environ = {k: v for k, v in os.environ.items() if not k.startswith("SUTRA_")}
    failed = subprocess.run(
        [SUTRA, *arguments], env=environ, capture_output=True, text=True, timeout=60, check=False
    )
    assert failed.returncode == status, failed.stderr
    assert complaint in failed.stderr
    assert "Traceback" not in failed.stderr
    assert "secret" not in failed.stderr


def test_status_says_when_nobody_lives(client, server):
    shown = sutra("status", SUTRA_BROKER_URL=server)
    assert shown.returncode == 1
    assert "sutra up" in shown.stderr


def test_a_server_that_is_away_is_named(tmp_path):
    away = sutra("status", SUTRA_BROKER_URL="redis://127.0.0.1:1/0")
    assert away.returncode == 1
    assert "does not answer" in away.stderr
