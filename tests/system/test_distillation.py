"""Whole distillations in this process: every kind of student, from texts to a version."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from sutra_tasks import DistillationConfig
from sutra_tasks.distillation.data.local_embedding import embed_locally
from sutra_tasks.distillation.data.run_texts import read_run_texts
from sutra_tasks.distillation.worker.pool import _with_threads
from sutra_tasks.distillation.worker.run import DistillationRun
from sutra_tasks.engines.load import load_engine
from sutra_tasks.engines.torch_engine import encoder as torch_engine
from sutra_tasks.errors import (
    InvalidOptionError,
    ModelError,
    ServerUnavailableError,
    TooLittleTextError,
    TrainingDivergedError,
)
from sutra_tasks.models.registry.model_registry import ModelRegistry
from sutra_tasks.settings import Settings
from sutra_tasks.vectors import Floats
from tests.system.tiny_models import KINDS, build


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Give a small teacher with random weights."""
    return build(KINDS["bert"], tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def wide_teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Give a teacher of the specification's width."""
    return build(replace(KINDS["bert"], hidden=1024), tmp_path_factory.mktemp("wide_teacher"))


@pytest.fixture
def options(teacher: str, tmp_path: Path) -> Settings:
    """Name folders with some texts, a few of them bad, and an empty registry."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "models").mkdir()
    words = " ".join(topics.values()).split()
    lines = [json.dumps(" ".join(words[at : at + 6])) for at in range(0, 6 * 1_500, 6)]
    (tmp_path / "texts" / "some.jsonl").write_text("\n".join([*lines, "{", '{"text": 1}']))
    pairs = [{"query": " ".join(words[at : at + 2]), "positive": " ".join(words[at : at + 6])}
             for at in range(0, 120, 6)]  # fmt: skip
    (tmp_path / "texts" / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return Settings(model=teacher, data_dir=str(tmp_path / "texts"), models_dir=str(tmp_path / "models"))


def recipe(teacher: str, **changed: Any) -> DistillationConfig:
    given: dict[str, Any] = {
        "teacher": teacher, "texts": ("some.jsonl",), "name": "small", "layers": 1, "output_dim": 16,
        "max_epochs": 1, "held_out": 20, "max_texts": 120, "batch_size": 16, "learning_rate": 1e-3,
    }  # fmt: skip
    return DistillationConfig(**(given | changed))


def run_of(config: DistillationConfig, options: Settings, **more: Any) -> DistillationRun:
    store = ModelRegistry(Path(options.models_dir or ""))
    material = read_run_texts(config, options, ())
    return DistillationRun(config, material, options, store, **({"report": lambda _: None} | more))


@pytest.mark.parametrize("width", [768, 384])
def test_a_teacher_of_1024_dimensions_is_distilled_to_the_specifications_widths(
    width: int, wide_teacher: str, options: Settings
) -> None:
    from sentence_transformers import SentenceTransformer

    options = replace(options, model=wide_teacher)
    config = recipe(wide_teacher, output_dim=width, pairs="pairs.jsonl", matryoshka=(64,))
    phases: list[str] = []
    run = run_of(config, options, report=lambda told: phases.append(told["phase"]))
    assert run.earlier_result() is None
    made = run.make()
    store = ModelRegistry(Path(options.models_dir or ""))
    manifest, folder = store.manifest("small", 1), store.folder("small", 1)
    assert (made["model"], made["made"], made["bad_rows"]) == ("small@1", True, 2)
    assert (manifest.width, manifest.parent.model if manifest.parent else "") == (width, "model")
    assert list(dict.fromkeys(phases)) == ["teacher", "student", "training", "measuring", "registering"]
    loaded = SentenceTransformer(str(folder), device="cpu", trust_remote_code=False)
    assert loaded.encode(["a text"]).shape == (1, width)
    report = json.loads((folder / "report.json").read_text())
    assert report["metrics"]["texts"] == 20
    assert 0 < report["metrics"]["cosine_similarity"] <= 1
    assert next(iter(report["metrics"])) == "lifted_cosine"
    assert report["metrics"]["lifted_cosine"] == pytest.approx(
        report["quality"]["lifted_cosine"]["value"], abs=1e-5
    )
    assert report["teacher"]["name"] == report["recipe"]["teacher"] == "model"
    for file in folder.rglob(
        "*"
    ):  # the teacher is a path on this machine, which is nobody else's business
        assert file.is_dir() or str(Path(wide_teacher).parent).encode() not in file.read_bytes(), file
    assert report["quality"]["ndcg_teacher"]["value"] > 0
    assert "some.jsonl:1501" in report["corpus"]["bad"][0]
    page = (folder / "report.html").read_text()
    assert "<svg" in page
    assert "http-equiv" in page or "Content-Security-Policy" in page
    card = (folder / "README.md").read_text()
    assert "some.jsonl" in card
    assert not list((Path(options.models_dir or "") / ".runs").glob(f"{run.fingerprint[:16]}*"))

    again = run_of(config, options).earlier_result()
    assert again is not None
    assert (again["model"], again["made"]) == ("small@1", False)
    assert run_of(replace(config, seed=1), options).earlier_result() is None


@pytest.mark.parametrize("student", ["static", "projection"])
def test_every_kind_of_student_is_made(student: str, teacher: str, options: Settings) -> None:
    config = recipe(teacher, student=student, layers=None, learning_rate=5e-3)
    made = run_of(config, options).make()
    report = json.loads(
        (ModelRegistry(Path(options.models_dir or "")).folder("small", 1) / "report.json").read_text()
    )
    assert made["space"] == report["student"]["space"]
    if student == "projection":
        assert report["quality"]["cosine"]["value"] == pytest.approx(1, abs=1e-3)
        assert made["metrics"]["lifted_cosine"] == pytest.approx(report["quality"]["ceiling"], abs=1e-3)
        folder = ModelRegistry(Path(options.models_dir or "")).folder("small", 1)
        assert "| cosine |" not in (folder / "README.md").read_text()
        assert "1 by construction" in (folder / "report.html").read_text()


def test_a_training_that_diverges_makes_no_version(teacher: str, options: Settings) -> None:
    run = run_of(recipe(teacher, learning_rate=1.0, warmup_share=0.0, max_epochs=20), options)
    with pytest.raises(TrainingDivergedError, match="no version was added"):
        run.make()
    assert ModelRegistry(Path(options.models_dir or "")).versions("small") == []


def test_what_was_not_named_by_the_deployment_is_no_teacher(options: Settings, tmp_path: Path) -> None:
    for name in (str(tmp_path), "../x", "bert-base-uncased"):
        with pytest.raises(InvalidOptionError, match="teacher"):
            run_of(recipe(name), options)


def test_too_little_text_is_refused_with_the_number_needed(teacher: str, options: Settings) -> None:
    with pytest.raises(TooLittleTextError) as refused:
        read_run_texts(recipe(teacher, held_out=600), options, ())
    assert (refused.value.needed, refused.value.bad_rows) == (1_800, 2)


def test_a_recipe_that_ends_its_workers_is_given_up_and_may_be_tried_anew(
    teacher: str, options: Settings
) -> None:
    def die(_: Any) -> None:
        raise KeyboardInterrupt

    run = run_of(recipe(teacher), options, report=die)
    for _ in range(options.max_attempts):
        with pytest.raises(KeyboardInterrupt):
            run.make()
    with pytest.raises(ModelError, match="ended its worker 3 times"):
        run.make()
    with pytest.raises(KeyboardInterrupt):
        run.make()


def test_an_error_that_the_worker_outlives_is_none_of_the_recipes(
    teacher: str, options: Settings
) -> None:
    def fail(_: Any) -> None:
        raise OSError("no space left on device")

    run = run_of(recipe(teacher), options, report=fail)
    for _ in range(options.max_attempts + 2):
        with pytest.raises(OSError, match="no space"):
            run.make()


def test_what_was_made_is_found_without_loading_the_teacher(
    teacher: str, options: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = recipe(teacher, student="projection", layers=None)
    assert run_of(config, options).make()["made"]
    monkeypatch.setattr(torch_engine, "TorchEncoder", lambda *_: pytest.fail("loaded"))
    found = run_of(config, options).earlier_result()
    assert found is not None
    assert found["model"] == "small@1"


def test_the_projection_is_that_of_the_runs_first_start(teacher: str, options: Settings) -> None:
    def stop(told: Mapping[str, Any]) -> None:
        if told["phase"] == "student":
            raise KeyboardInterrupt

    config = recipe(teacher, student="projection", layers=None, output_dim=8)
    run = run_of(config, options, report=stop)
    with pytest.raises(KeyboardInterrupt):
        run.make()
    first = np.load(run.folder / "matrix.npy")
    turned = np.ascontiguousarray(first[::-1])
    np.save(run.folder / "matrix.npy", turned)
    run_of(config, options).make()
    folder = ModelRegistry(Path(options.models_dir or "")).folder("small", 1)
    weights = [load_file(path) for path in folder.rglob("*.safetensors")]
    dense = next(one["linear.weight"] for one in weights if "linear.weight" in one)
    assert np.abs(dense.astype(np.float32) - turned).max() < 1e-3


def test_who_computes_the_teachers_vectors_is_told(teacher: str, options: Settings) -> None:
    def by_fleet(texts: Sequence[str], _: str) -> Iterator[Floats]:
        yield from embed_locally(load_engine(replace(options, engine="torch")), texts[:5])
        raise ServerUnavailableError("ConnectionError")

    told: list[str] = []

    def note(progress: Mapping[str, Any]) -> None:
        if progress["phase"] == "teacher":
            told.append(progress["by"])

    config = recipe(teacher, student="projection", layers=None)
    run_of(config, options, by_fleet=by_fleet, report=note).make()
    assert list(dict.fromkeys(told)) == ["the fleet", "this worker"]


def test_a_run_whose_fleet_fails_computes_the_rest_by_itself(teacher: str, options: Settings) -> None:
    given: list[int] = []

    def by_fleet(texts: Sequence[str], _: str) -> Iterator[Floats]:
        for row in embed_locally(load_engine(replace(options, engine="torch")), texts[:5]):
            given.append(len(row))
            yield row
        raise ServerUnavailableError("ConnectionError")

    config = recipe(teacher, student="projection", layers=None)
    assert run_of(config, options, by_fleet=by_fleet).make()["made"]
    report = ModelRegistry(Path(options.models_dir or "")).folder("small", 1) / "report.json"
    assert given == [KINDS["bert"].hidden] * 5
    assert json.loads(report.read_text())["quality"]["cosine"]["value"] == pytest.approx(1, abs=1e-3)


def test_a_run_and_every_engine_it_loads_use_the_threads_of_the_deployment(options: Settings) -> None:
    import torch

    before = torch.get_num_threads()
    try:
        chosen = _with_threads(replace(options, distill_threads=3))
        assert torch.get_num_threads() == 3
        load_engine(chosen)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
