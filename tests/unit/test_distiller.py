"""When a run pauses, and how its recipe and progress are shown."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sutra_tasks.admission import Backlog
from sutra_tasks.cli.distill import BARS, recipe, sparkline
from sutra_tasks.distillation.config import DistillationConfig
from sutra_tasks.distillation.run import default_name
from sutra_tasks.errors import InvalidOptionError, SettingsError
from sutra_tasks.fleet.distiller import Pacer
from sutra_tasks.fleet.promotion import Promotion


def waiting(seconds: float) -> Backlog:
    return Backlog(tokens=round(1000 * seconds), tokens_per_s=1000.0)


def test_a_run_pauses_when_the_fleet_is_saturated_and_goes_on_well_below() -> None:
    pacer = Pacer(2.0)
    waits_s = [0, 1.9, 2.0, 1.5, 1.0, 0.9, 1.9, 5]
    assert [pacer.paused(waiting(s)) for s in waits_s] == [0, 0, 1, 1, 1, 0, 0, 1]


def test_a_run_goes_on_where_no_router_says_what_waits() -> None:
    pacer = Pacer(2.0)
    assert pacer.paused(waiting(9))
    assert not pacer.paused(None)
    assert not pacer.paused(Backlog(tokens=9, tokens_per_s=0))


def test_a_pause_can_be_turned_off() -> None:
    assert not Pacer(0.0).paused(waiting(1e6))


def test_options_go_before_the_file(tmp_path: Path) -> None:
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps({"teacher": "a", "texts": ["x.txt"], "alpha": 0.25, "layers": 2}))
    made = recipe(file, {"teacher": "b", "layers": None, "texts": (), "output_dim": 8})
    assert made == DistillationConfig(teacher="b", texts=("x.txt",), alpha=0.25, layers=2, output_dim=8)


def test_what_is_no_recipe_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "recipe.json"
    file.write_text("{")
    with pytest.raises(SettingsError, match="--config"):
        recipe(file, {})
    file.write_text('{"teacher": "a", "texts": ["x.txt"], "learning_rat": 1}')
    with pytest.raises(InvalidOptionError, match="learning_rat"):
        recipe(file, {})
    with pytest.raises(InvalidOptionError, match="teacher"):
        recipe(None, {"texts": ("x.txt",)})


@given(st.lists(st.floats(-1e6, 1e6), max_size=200))
def test_a_sparkline_rises_and_falls_with_its_numbers(values: list[float]) -> None:
    drawn = sparkline(values, 20)
    assert len(drawn) == min(len(values), 20)
    if 0 < len(values) <= 20:
        assert BARS.index(drawn[values.index(max(values))]) == max(map(BARS.index, drawn))


@given(st.text(min_size=1, max_size=80))
def test_the_name_of_a_student_is_one_that_a_model_may_have(teacher: str) -> None:
    config = DistillationConfig(teacher=teacher, texts=("x.txt",), layers=3, output_dim=192)
    assert DistillationConfig(teacher="t", texts=("x",), name=default_name(config)).name


def test_a_promotion_reads_back() -> None:
    one = Promotion("a1", "search", 3)
    assert Promotion.from_json(one.to_json()) == one
    assert one.reference == "search@3"
    assert Promotion.from_json(None) is None
    assert Promotion.from_json('{"v": 99}') is None
