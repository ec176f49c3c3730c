"""What a run drew of the sample is there when it is delivered again, and gone when it has ended."""

import os
from pathlib import Path

import pytest

from sutra_tasks.distillation.worker.run_sample import RunSample

RETENTION_S = 100.0


def drawn(runs: Path, task_id: str = "a", now: float = 0.0) -> RunSample:
    return RunSample(runs, task_id, RETENTION_S, clock=lambda: now)


def never() -> list[str]:
    pytest.fail("drawn again")


def test_a_run_that_is_delivered_again_has_the_same_texts(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    assert drawn(runs).texts(lambda: ["one", "zwei é"]) == ["one", "zwei é"]
    assert drawn(runs).texts(never) == ["one", "zwei é"]
    assert drawn(runs, "b").texts(lambda: ["other"]) == ["other"]


def test_nobody_else_may_read_them(tmp_path: Path) -> None:
    drawn(tmp_path).texts(lambda: ["private"])
    assert [path.stat().st_mode & 0o777 for path in tmp_path.iterdir()] == [0o600]


def test_they_go_when_the_run_has_ended(tmp_path: Path) -> None:
    drawn(tmp_path).texts(lambda: ["one"])
    drawn(tmp_path).delete()
    drawn(tmp_path).delete()
    assert not list(tmp_path.iterdir())


def test_no_task_names_a_file(tmp_path: Path) -> None:
    drawn(tmp_path / "runs", "../../x/" + "y" * 500).texts(lambda: ["one"])
    assert [path.parent.name for path in tmp_path.rglob("*") if path.is_file()] == ["runs"]


def test_what_a_lost_run_drew_goes_with_the_retention_and_ones_own_stays(tmp_path: Path) -> None:
    for name in ("a", "b"):
        drawn(tmp_path, name).texts(lambda: ["one"])
    (tmp_path / ".sample-x.json.1.writing").write_text("half")
    (tmp_path / "starts-1.json").write_text("{}")
    for path in tmp_path.iterdir():
        os.utime(path, (0, 0))
    drawn(tmp_path, "a", RETENTION_S - 1).texts(never)
    assert len(list(tmp_path.iterdir())) == 4
    drawn(tmp_path, "a", RETENTION_S + 1).texts(never)
    assert len(list(tmp_path.iterdir())) == 2
