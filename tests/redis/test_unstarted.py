"""A worker that cannot start says why: to its supervisor, or on standard error if it has none."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from sutra_tasks import keys
from sutra_tasks.host.supervisor import Supervisor, WorkerSpec
from sutra_tasks.membership.unstarted import CANNOT_START, end_unstarted, why_unstarted
from sutra_tasks.settings import Settings
from tests.conftest import wait_until

if TYPE_CHECKING:
    import redis

TELLING = """
from sutra_tasks.membership.unstarted import end_unstarted
from sutra_tasks.settings import settings
end_unstarted(settings(), "gpu0", "the model [x] is not there")
"""


def test_a_supervised_worker_tells_its_supervisor_and_nobody_else(
    client: redis.Redis, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        end_unstarted(Settings(broker_url=url, incarnation="gpu0.1"), "gpu0", "it is broken")
    assert ended.value.code == CANNOT_START
    assert why_unstarted(client, "gpu0.1") == "it is broken"
    assert why_unstarted(client, "gpu0.2") is None
    assert 0 < client.ttl(keys.unstarted("gpu0.1")) <= keys.UNSTARTED_S
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("server", ["redis://127.0.0.1:1/0", None])
def test_without_a_supervisor_or_a_server_it_is_said_on_standard_error(
    server: str | None, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = Settings(broker_url=server or url, incarnation="gpu0.1" if server else None)
    with pytest.raises(SystemExit):
        end_unstarted(options, "gpu0", "it is broken")
    assert capsys.readouterr().err == "gpu0 cannot start: it is broken\n"


Supervise = Callable[..., tuple[Supervisor, list[str]]]


@pytest.fixture
def supervise(client: redis.Redis, url: str, request: pytest.FixtureRequest) -> Supervise:
    def start(*command: str) -> tuple[Supervisor, list[str]]:
        reports: list[str] = []
        spec = WorkerSpec("gpu0", [sys.executable, *command], {"SUTRA_BROKER_URL": url})
        supervisor = Supervisor([spec], client, results=client, drain_s=1, report=reports.append)
        request.addfinalizer(supervisor.stop)
        supervisor.start(time.monotonic())
        return supervisor, reports

    return start


def test_a_supervisor_passes_on_why_a_worker_cannot_start(supervise: Supervise) -> None:
    supervisor, reports = supervise("-c", TELLING)
    wait_until(lambda: supervisor.step(time.monotonic()) and supervisor.cannot_start)
    assert supervisor.cannot_start == "gpu0 cannot start: the model [x] is not there"
    assert reports == [f"{supervisor.cannot_start}; trying again now"]


def test_a_worker_that_dies_again_and_again_counts_as_one_that_cannot_start(
    supervise: Supervise,
) -> None:
    supervisor, reports = supervise("-c", "import os; os.kill(os.getpid(), 9)")
    now = time.monotonic()
    while supervisor.cannot_start is None:
        os.waitid(os.P_PID, supervisor.pids["gpu0"], os.WEXITED | os.WNOWAIT)
        now += 20  # every pause is over
        supervisor.is_starting = True  # and so it does not help to have lived for long
        supervisor.step(now)
    assert len(reports) == 3
    assert (
        "3 times soon after its start, the last time with signal 9 (SIGKILL" in supervisor.cannot_start
    )
    assert "memory" in supervisor.cannot_start


def test_a_worker_that_dies_once_is_only_restarted(supervise: Supervise) -> None:
    supervisor, reports = supervise("-c", "raise SystemExit(3)")
    wait_until(lambda: supervisor.step(time.monotonic()) and reports)
    assert supervisor.cannot_start is None
    assert "ended with status 3; 0 messages were requeued; restarting now" in reports[0]
