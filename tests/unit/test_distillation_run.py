"""When a run pauses, and how its recipe and progress are shown."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sutra_tasks.cli.distill import BARS, recipe, sparkline, within
from sutra_tasks.client.admission import Backlog
from sutra_tasks.distillation.config import DistillationConfig
from sutra_tasks.distillation.names import default_name, model_name
from sutra_tasks.distillation.worker.run_monitor import should_pause
from sutra_tasks.errors import InvalidOptionError, SettingsError, UnsupportedVersionError
from sutra_tasks.models.rollout.promotion import Promotion


def waiting(seconds: float) -> Backlog:
    return Backlog(tokens=round(1000 * seconds), tokens_per_s=1000.0)


def test_a_run_pauses_when_the_fleet_is_saturated_and_goes_on_well_below() -> None:
    paused, found = False, []
    for waits_s in (0, 1.9, 2.0, 1.5, 1.0, 0.9, 1.9, 5):
        paused = should_pause(waiting(waits_s), 2.0, is_paused=paused)
        found.append(paused)
    assert found == [0, 0, 1, 1, 1, 0, 0, 1]


@pytest.mark.parametrize("backlog", [None, Backlog(tokens=9, tokens_per_s=0)])
def test_a_run_goes_on_where_no_router_says_what_waits(backlog: Backlog | None) -> None:
    assert not should_pause(backlog, 2.0, is_paused=True)


def test_a_pause_can_be_turned_off() -> None:
    assert not should_pause(waiting(1e6), 0.0, is_paused=False)


def test_options_go_before_the_file(tmp_path: Path) -> None:
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps({"teacher": "a", "texts": ["x.txt"], "alpha": 0.25, "layers": 2}))
    file.write_bytes(file.read_text().encode("utf-16"))  # as some shells write what a command prints
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
    file.write_text('[{"teacher": "a"}]')
    with pytest.raises(SettingsError, match="no object"):
        recipe(file, {})


def test_a_recipe_of_another_release_is_not_read_as_one_of_this(tmp_path: Path) -> None:
    file = tmp_path / "recipe.json"
    stored = DistillationConfig(teacher="a", texts=("x.txt",)).to_json()
    file.write_text(json.dumps(stored))
    assert recipe(file, {}).to_json() == stored
    file.write_text(json.dumps(stored | {"v": 2}))
    with pytest.raises(UnsupportedVersionError):
        recipe(file, {})


def test_files_are_named_as_the_worker_knows_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data" / "deep").mkdir(parents=True)
    for name in ("data/a.txt", "data/deep/p.jsonl", "outside.txt"):
        (tmp_path / name).write_text("")
    monkeypatch.chdir(tmp_path)
    texts, pairs = ("data/a.txt", "b.txt", "outside.txt"), "data/deep/p.jsonl"
    found = within(DistillationConfig(teacher="t", texts=texts, pairs=pairs), "data")
    assert (found.texts, found.pairs) == (("a.txt", "b.txt", "outside.txt"), "deep/p.jsonl")
    assert within(DistillationConfig(teacher="t", texts=("a.txt",)), "data").pairs is None


@given(st.lists(st.floats(-1e6, 1e6), max_size=200))
def test_a_sparkline_rises_and_falls_with_its_numbers(values: list[float]) -> None:
    drawn = sparkline(values, 20)
    assert len(drawn) == min(len(values), 20)
    if 0 < len(values) <= 20:
        assert BARS.index(drawn[values.index(max(values))]) == max(map(BARS.index, drawn))


TEACHERS = st.text(min_size=1, max_size=80) | st.text("a-._/@", min_size=1, max_size=80)


@given(TEACHERS)
def test_the_name_of_a_student_is_one_that_a_model_may_have(teacher: str) -> None:
    config = DistillationConfig(teacher=teacher, texts=("x.txt",), layers=3, output_dim=192)
    assert DistillationConfig(teacher="t", texts=("x",), name=default_name(config)).name


@pytest.mark.parametrize(
    ("teacher", "name"),
    [
        ("all-MiniLM-L6-v2", "all-MiniLM-L6-v2-layers3-192"),
        ("BAAI/bge-m3", "BAAI-bge-m3-layers3-192"),
        ("/home/someone/models/e5", "e5-layers3-192"),
        ("/cache/hub/models--BAAI--bge-m3/snapshots/5617a9", "BAAI-bge-m3-layers3-192"),
        ("search@12", "search-layers3-192"),
        ("thenlper/gte-large", "thenlper-gte-large-layers3-192"),
        (
            "sentence-transformers/multi-qa-mpnet-base-dot-v1",
            "transformers-multi-qa-mpnet-base-dot-v1-layers3-192",
        ),
        (
            "sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2",
            "rs-paraphrase-multilingual-MiniLM-L12-v2-layers3-192",
        ),
        (
            "sentence-transformers/distiluse-base-multilingual-cased-v2",
            "ers-distiluse-base-multilingual-cased-v2-layers3-192",
        ),
        ("mixedbread-ai/mxbai-embed-large-v1", "mixedbread-ai-mxbai-embed-large-v1-layers3-192"),
        ("nomic-ai/nomic-embed-text-v1.5", "nomic-ai-nomic-embed-text-v1.5-layers3-192"),
        ("intfloat/multilingual-e5-large", "intfloat-multilingual-e5-large-layers3-192"),
        ("/srv/models/../bge..small", "bge.small-layers3-192"),
        ("日本語", "model-layers3-192"),
    ],
)  # fmt: skip
def test_real_teachers_give_names_that_models_may_have(teacher: str, name: str) -> None:
    config = DistillationConfig(teacher=teacher, texts=("x.txt",), layers=3, output_dim=192)
    assert model_name(config) == name
    assert model_name(DistillationConfig(teacher="t", texts=("x",), name=name)) == name


def test_a_promotion_reads_back() -> None:
    one = Promotion("a1", "search", 3)
    assert Promotion.from_json(one.to_json()) == one
    assert one.reference == "search@3"
    assert Promotion.from_json(None) is None
    assert Promotion.from_json('{"v": 99}') is None
