"""Process 1 of a container, which the kernel protects from every signal that it does not handle."""

import os
import signal
import subprocess
import sys

import psutil
import pytest

from sutra_tasks.batching.watchdog import HUNG
from sutra_tasks.membership.fleet import fleet_members
from tests.conftest import wait_until
from tests.system.conftest import ROOT
from tests.unit.test_batcher_faults import HANGING

ALONE = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc", "--kill-child"]


def can_be_alone():
    try:
        return (
            subprocess.run([*ALONE, "true"], capture_output=True, timeout=20, check=False).returncode
            == 0
        )
    except OSError:
        return False


pytestmark = pytest.mark.skipif(not can_be_alone(), reason="needs namespaces of users and processes")


def test_a_batch_that_hangs_ends_it():
    command = [*ALONE, sys.executable, "-c", HANGING]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout) == (HUNG, "still here\n")
    assert "in encode" in done.stderr


@pytest.fixture
def start(server, client):
    """Run a device worker as process 1; give its process, and its number out here."""
    started = []

    def start(**environ):
        given = {"SUTRA_BROKER_URL": server, "SUTRA_DEVICE_ID": "one", "SUTRA_HEARTBEAT_S": "0.2"}
        process = subprocess.Popen(
            [*ALONE, sys.executable, "-m", "sutra_tasks.roles", "device"],
            env={**os.environ, **given, **environ}, cwd=ROOT, stderr=subprocess.PIPE,
        )  # fmt: skip
        started.append(process)
        wait_until(lambda: psutil.Process(process.pid).children())
        (inside,) = psutil.Process(process.pid).children()
        return process, inside.pid

    yield start
    for process in started:
        process.kill()
        process.communicate()


def state(client):
    records = [one.record for one in fleet_members(client) if one.id == "one" and one.record]
    return (records[0].state, records[0].reason) if records else None


def test_sigterm_drains_it(start, client):
    process, pid = start(SUTRA_ENGINE="simulated")
    wait_until(lambda: state(client) == ("healthy", ""), within_s=60)
    os.kill(pid, signal.SIGTERM)
    assert process.wait(30) == 0
    assert state(client) is None


def test_sigterm_ends_it_while_it_loads_its_model(start, client):
    process, pid = start()
    wait_until(lambda: "all-MiniLM-L6-v2 is being loaded" in str(state(client)), within_s=60)
    os.kill(pid, signal.SIGTERM)
    assert process.wait(30) == 0
    assert state(client) is None
    assert b"Traceback" not in process.stderr.read()


ORPHANS = """
import subprocess, time
import psutil
from sutra_tasks.host.processes import reap_orphans

def zombies():
    return {one.pid for one in psutil.process_iter() if one.status() == psutil.STATUS_ZOMBIE}

own = subprocess.Popen(["sh", "-c", "exit 7"])
while own.pid not in zombies():
    time.sleep(0.01)
reap_orphans([own.pid])
print(own.wait())
subprocess.run(["sh", "-c", "sh -c 'exit 3' & sh -c 'exit 4' & exit 0"], check=True)
while len(zombies()) < 2:
    time.sleep(0.01)
reap_orphans([])
print(len(zombies()))
"""


def test_orphans_that_it_gets_are_collected_and_its_own_children_keep_their_status():
    command = [*ALONE, sys.executable, "-c", ORPHANS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    assert done.stdout == "7\n0\n", done.stderr
