"""How a delivered run begins and ends: its lock, its sample, and what its deaths come to."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from celery.exceptions import Ignore, Reject
from celery.worker.state import revoked

from sutra_tasks import DistillationConfig, keys
from sutra_tasks.distillation.worker import pool as distiller
from sutra_tasks.distillation.worker.pool import DistillPool
from sutra_tasks.distillation.worker.run_monitor import WorkerStopping
from sutra_tasks.errors import DistillationUnderWayError, ModelError
from sutra_tasks.settings import Settings

CONFIG = DistillationConfig(teacher="tiny", sample=True, name="small")


class DeathError(BaseException):
    """What no process outlives."""


def fail(error: BaseException) -> Callable[[], Any]:
    def failing() -> Any:
        raise error

    return failing


class Worker:
    """A distill worker with its server; the texts and the run itself are what tests say."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs, self.values = folder / ".runs", dict[str, bytes]()
        self.draws, self.gathered = 0, list[Sequence[str]]()
        self.gather: Callable[[], Any] = lambda: None
        self.made: dict[str, Any] | None = None
        self.make: Callable[[], Any] = lambda: {"model": "small@1", "made": True}
        self.told = 0
        for name, found in (
            ("read_run_texts", self._gather), ("DistillationRun", self._a_run),
            ("open_sample", lambda *_: self), ("_with_threads", lambda options: options),
            ("fleet_members", lambda _: []),
        ):  # fmt: skip
            monkeypatch.setattr(distiller, name, found)
        self._options = Settings(models_dir=str(folder))

    def deliver(self, task_id: str = "task-1") -> Any:
        """Deliver a task to a worker that has just started."""
        client: Any = SimpleNamespace(evalsha=self._evalsha, exists=self.values.__contains__)
        pool: Any = object.__new__(DistillPool)
        pool._options, pool._client, pool._incarnation = self._options, client, "worker.1"
        pool._stopping = SimpleNamespace(is_set=lambda: False)
        pool._request = SimpleNamespace(id=task_id, revoked=self._revoked)
        return pool._run(CONFIG)

    @property
    def kept(self) -> list[Path]:
        return list(self.runs.glob("*sample*"))

    def texts(self) -> list[str]:
        self.draws += 1
        return [f"draw {self.draws}"]

    def _gather(self, _: Any, __: Any, texts: Sequence[str]) -> None:
        self.gathered.append(texts)
        self.gather()

    def _a_run(self, *_: Any, **__: Any) -> Any:
        return SimpleNamespace(earlier_result=lambda: self.made, make=self.make)

    def _evalsha(self, *_: Any) -> bytes | None:
        return self.values.get("lock")

    def _revoked(self) -> None:
        assert "task-1" in revoked
        self.told += 1


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    yield Worker(tmp_path, monkeypatch)
    revoked.clear()


@pytest.mark.parametrize(
    ("end", "raised"), [(DeathError(), DeathError), (WorkerStopping(), Reject)]
)  # fmt: skip
def test_a_run_that_is_delivered_again_has_the_sample_it_had(
    end: BaseException, raised: type[BaseException], worker: Worker
) -> None:
    worker.make = fail(end)
    with pytest.raises(raised):
        worker.deliver()
    worker.make = lambda: {"model": "small@1"}
    assert worker.deliver() == {"model": "small@1"}
    assert worker.gathered == [["draw 1"], ["draw 1"]]
    assert not worker.kept


def test_the_sample_of_a_run_that_failed_is_not_kept(worker: Worker) -> None:
    worker.make = fail(OSError("no space"))
    with pytest.raises(OSError, match="no space"):
        worker.deliver()
    assert not worker.kept


def test_a_run_that_was_cancelled_while_it_waited_does_not_begin(worker: Worker) -> None:
    worker.values[keys.cancelled("task-1")] = b"1"
    with pytest.raises(Ignore):
        worker.deliver()
    assert (worker.told, worker.gathered, worker.kept) == (1, [], [])


def test_what_another_run_makes_costs_no_look_at_the_texts(worker: Worker) -> None:
    worker.values["lock"] = b"task-2 worker.2"
    with pytest.raises(DistillationUnderWayError):
        worker.deliver()
    assert worker.gathered == []


def test_what_was_made_is_not_made_again(worker: Worker) -> None:
    worker.made, worker.make = {"model": "small@1", "made": False}, fail(AssertionError())
    assert worker.deliver() == worker.made


def test_texts_or_a_teacher_that_end_the_worker_are_given_up(worker: Worker) -> None:
    worker.gather = fail(DeathError())
    for _ in range(3):
        with pytest.raises(DeathError):
            worker.deliver()
    with pytest.raises(ModelError, match="ended its worker 3 times"):
        worker.deliver()
    assert not worker.kept
