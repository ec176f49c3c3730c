"""A run whose workers die of it is given up; one that ends in any other way is not."""

import json
from pathlib import Path

import pytest

from sutra_tasks import DistillationConfig
from sutra_tasks.distillation.worker.attempts import limit_attempts, limit_preparation
from sutra_tasks.errors import ModelError
from sutra_tasks.settings import Settings

CONFIG = DistillationConfig(teacher="tiny", texts=("a.txt",))


class DeathError(BaseException):
    """What no run outlives."""


def die(folder: Path, at: str = "here") -> None:
    with limit_attempts(folder / "attempts.json", "small", at, 3):
        raise DeathError


def test_what_ends_its_process_again_and_again_is_given_up_and_may_be_tried_anew(tmp_path: Path) -> None:
    for _ in range(3):
        with pytest.raises(DeathError):
            die(tmp_path)
    with pytest.raises(ModelError, match="ended its worker 3 times at here"):
        die(tmp_path)
    with pytest.raises(DeathError):
        die(tmp_path)


def test_whoever_gets_further_is_counted_anew(tmp_path: Path) -> None:
    for number in range(9):
        with pytest.raises(DeathError):
            die(tmp_path, at=f"checkpoint {number // 3}")


def test_an_ordinary_error_is_no_death(tmp_path: Path) -> None:
    path = tmp_path / "attempts.json"
    for _ in range(9):
        with pytest.raises(OSError, match="no space"), limit_attempts(path, "small", "here", 3):
            raise OSError("no space")
    with limit_attempts(path, "small", "here", 3):
        assert json.loads(path.read_text())["attempts"] == 1
    assert not path.exists()


def test_what_comes_before_a_run_has_its_folder_is_counted_for_each_recipe(tmp_path: Path) -> None:
    options = Settings(models_dir=str(tmp_path))
    for _ in range(options.max_attempts):
        with pytest.raises(DeathError), limit_preparation(CONFIG, options):
            raise DeathError
    other = DistillationConfig(teacher="tiny", texts=("b.txt",))
    with limit_preparation(other, options):
        pass
    with (
        pytest.raises(ModelError, match="its texts and its teacher"),
        limit_preparation(CONFIG, options),
    ):
        pass
