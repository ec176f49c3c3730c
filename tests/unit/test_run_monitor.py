"""A run is watched: it ends when that is asked, pauses where it must, and is told of all the while."""

import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from celery.worker.state import revoked

from sutra_tasks import keys
from sutra_tasks.broker.result_backend import LeaseEnded
from sutra_tasks.client.admission import Backlog
from sutra_tasks.distillation.worker.run_monitor import RunCancelled, RunMonitor, WorkerStopping
from sutra_tasks.errors import DistillationUnderWayError
from sutra_tasks.settings import Settings

HERE, FLEET = ({"phase": "teacher", "by": by} for by in ("this worker", "the fleet"))
SATURATED = Backlog(10**6, 1000.0).to_json()


class Watched:
    """A run with a server, a result backend and a clock that tests turn."""

    def __init__(self) -> None:
        self.now, self.values, self.asked = 0.0, dict[str, Any](), 0
        self.told: list[dict[str, Any]] = []
        self.not_stored: Exception | None = None
        self.stopping, self.waits = threading.Event(), list[Callable[[], None]]()
        backend = SimpleNamespace(store_result=self._store)
        request: Any = SimpleNamespace(
            id="task-1", task=SimpleNamespace(backend=backend), send_event=lambda *_, **__: None
        )
        stopping: Any = SimpleNamespace(is_set=self.stopping.is_set, wait=self._wait)
        client: Any = SimpleNamespace(get=self.values.get, exists=self._exists)
        self.lock_error: Exception | None = None
        self.monitor = RunMonitor(
            client, Settings(), request, stopping,
            check_lock=self._check_lock, clock=lambda: self.now,
        )  # fmt: skip

    def __call__(self, progress: dict[str, Any], seconds: float = 1.0) -> None:
        self.now += seconds
        self.monitor.report(progress)

    def _exists(self, name: str) -> bool:
        self.asked += 1
        if "away" in self.values:
            raise redis.ConnectionError
        return name in self.values

    def _store(self, _: str, progress: dict[str, Any], state: str) -> None:
        if self.not_stored is not None:
            raise self.not_stored
        self.told.append({"state": state, **progress})

    def _wait(self, seconds: float) -> None:
        self.now += seconds
        self.waits.pop(0)()

    def _check_lock(self) -> None:
        if self.lock_error is not None:
            raise self.lock_error

    def saturate(self, looks: int) -> None:
        """Have the fleet saturated for so many looks."""
        self.values[keys.backlog()] = SATURATED
        end: Callable[[], None] = self.values.clear
        self.waits = [lambda: None] * (looks - 1) + [end]


@pytest.fixture
def run() -> Watched:
    return Watched()


@pytest.fixture(autouse=True)
def _nothing_stays_revoked() -> Iterator[None]:
    yield
    revoked.clear()


def test_a_run_that_was_cancelled_while_no_worker_was_up_ends(run: Watched) -> None:
    run.monitor.end_if_asked()
    run.values[keys.cancelled("task-1")] = 1
    run.now += 1
    with pytest.raises(RunCancelled):
        run.monitor.end_if_asked()


def test_a_run_that_is_revoked_ends(run: Watched) -> None:
    revoked.add("task-1")
    with pytest.raises(RunCancelled):
        run(HERE)


def test_a_run_of_many_steps_asks_the_server_twice_a_second(run: Watched) -> None:
    for _ in range(1_000):
        run(HERE, 0.01)
    assert 18 <= run.asked <= 21


def test_a_server_that_is_away_ends_no_run(run: Watched) -> None:
    run.values["away"] = 1
    run(HERE)


def test_a_worker_that_lost_its_lease_stops_its_run(run: Watched) -> None:
    run.not_stored = LeaseEnded()
    with pytest.raises(WorkerStopping):
        run(HERE)


def test_a_run_that_cannot_be_told_of_goes_on(run: Watched) -> None:
    run.not_stored = ValueError("not JSON")
    run(HERE)


def test_what_the_lock_found_is_raised_at_the_next_look(run: Watched) -> None:
    run.lock_error = LeaseEnded()
    with pytest.raises(WorkerStopping):
        run(HERE)
    run.lock_error = DistillationUnderWayError("small", "task-2")
    with pytest.raises(DistillationUnderWayError):
        run(HERE)


def test_a_run_pauses_unless_the_fleet_works_for_it(run: Watched) -> None:
    run.saturate(3)
    run(FLEET)
    assert len(run.waits) == 3
    run(HERE)
    assert not run.waits
    run.saturate(3)
    run({"phase": "training"})
    assert not run.waits


def test_a_long_pause_is_told_again_and_again(run: Watched) -> None:
    run.saturate(20)
    run({"phase": "training", "step": 7})
    paused = [one for one in run.told if one["phase"] == "paused"]
    assert 9 <= len(paused) <= 11
    assert paused[0] == {"state": "PROGRESS", "phase": "paused", "step": 7}


def test_each_phase_is_told_however_soon_it_comes(run: Watched) -> None:
    for phase in ("training", "training", "measuring", "registering"):
        run({"phase": phase}, 0.01)
    assert [one["phase"] for one in run.told] == ["training", "measuring", "registering"]


def test_a_paused_run_ends_when_that_is_asked(run: Watched) -> None:
    run.saturate(3)
    run.waits[1] = run.stopping.set
    with pytest.raises(WorkerStopping):
        run(HERE)
    assert len(run.waits) == 1
