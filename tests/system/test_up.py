"""``sutra up`` starts, serves, and however it ends leaves no process and no file."""

import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.conftest import wait_until

SUTRA = str(Path(sys.executable).with_name("sutra"))
READY = "Ctrl-C stops"
EXECUTE = "os.execv(sys.argv[1], sys.argv[1:])"


def sutra(*arguments, **environ):
    return subprocess.run(
        [SUTRA, *arguments], env={**os.environ, **environ},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.fixture
def up(tmp_path):
    """Run ``sutra up`` with its own server; give its process, the broker's address, and its files."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*options, ready=True, command=(SUTRA, "up"), output=None):
        said = tmp_path / f"up{len(started)}.log"
        folder = tmp_path / "tmp"
        folder.mkdir(exist_ok=True)
        (tmp_path / "queue.py").write_text("raise SystemExit('a file of the current folder was run')")
        environ = {k: v for k, v in os.environ.items() if not k.startswith("SUTRA_")}
        with said.open("wb") as log:
            process = subprocess.Popen(
                [*command, "--engine", "simulated", *options],
                env={**environ, "TMPDIR": str(folder), "COLUMNS": "200"},
                stdin=subprocess.DEVNULL, stdout=output or log, stderr=output or log,
                start_new_session=True, cwd=tmp_path,
            )  # fmt: skip
        started.append(process)
        if ready:
            wait_until(lambda: READY in said.read_text() or process.poll() is not None, within_s=60)
        found = re.search(r"SUTRA_BROKER_URL=(\S+)", said.read_text())
        return process, found.group(1) if found else None, folder, said

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
        process.wait(30)


def children_of(process):
    return psutil.Process(process.pid).children(recursive=True)


def ended(children):
    return not [c for c in children if c.is_running() and c.status() != psutil.STATUS_ZOMBIE]


def test_a_fleet_starts_serves_and_stops_without_a_trace(up):
    process, address, folder, said = up("--devices", "2")
    assert address is not None, said.read_text()
    children = children_of(process)
    assert len(children) == 5  # server, router, two devices, beat
    shown = sutra("status", SUTRA_BROKER_URL=address)
    assert shown.returncode == 0
    assert shown.stdout.count("healthy") == 2
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)  # an impatient second Ctrl-C breaks nothing off
    assert process.wait(30) == 0
    assert ended(children)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("ends", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_starting_leaves_nothing(up, ends):
    process, _, folder, _ = up(ready=False)
    wait_until(lambda: len(psutil.Process(process.pid).children()) >= 2)
    children = children_of(process)
    process.send_signal(ends)
    assert process.wait(30) == 0
    assert ended(children)
    assert list(folder.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children of a parent's death")
def test_a_killed_supervisor_takes_its_children_along(up):
    process, _, _, _ = up("--devices", "1")
    children = children_of(process)
    process.kill()
    process.wait(10)
    wait_until(lambda: ended(children), within_s=60)  # they look for their server, which ends as well


def test_a_terminal_that_closes_ends_the_fleet_and_leaves_nothing(up, tmp_path):
    master, slave = pty.openpty()
    # `script`-like: the terminal is the command's controlling one, so the kernel hangs it up.
    take = "import fcntl, os, sys, termios; fcntl.ioctl(1, termios.TIOCSCTTY, 0); " + EXECUTE
    process, _, folder, _ = up(
        "--devices", "1", command=(sys.executable, "-c", take, SUTRA, "up"), ready=False, output=slave
    )
    os.close(slave)
    seen = b""
    while READY.encode() not in seen:
        seen += os.read(master, 65_536)
    children = children_of(process)
    os.close(master)
    process.wait(30)
    assert ended(children)
    assert list(folder.iterdir()) == []


def test_under_nohup_and_without_a_reader_it_goes_on(up):
    reader, writer = os.pipe()
    ignoring = "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); " + EXECUTE
    process, _, folder, _ = up(
        "--devices",
        "1",
        command=(sys.executable, "-c", ignoring, SUTRA, "up"),
        ready=False,
        output=writer,
    )
    os.close(writer)
    seen = b""
    while READY.encode() not in seen:
        seen += os.read(reader, 65_536)
    (address,) = re.findall(r"SUTRA_BROKER_URL=(\S+)", seen.decode())
    os.close(reader)
    children = children_of(process)
    process.send_signal(signal.SIGHUP)
    device = next(child for child in children if "device" in child.cmdline())
    device.kill()  # which is reported, to nobody
    wait_until(lambda: not device.is_running())
    wait_until(lambda: sutra("status", SUTRA_BROKER_URL=address).stdout.count("healthy") == 1)
    children = children_of(process)
    process.terminate()
    assert process.wait(30) == 0
    assert ended(children)
    assert list(folder.iterdir()) == []


def test_a_slow_start_says_what_it_does(up):
    _, _, _, said = up("--devices", "1", "--engine", "torch")
    assert re.search(r"cpu0: all-MiniLM-L6-v2 is being loaded", said.read_text())
