"""Whole distillations: as values in this process, and as tasks of a worker that is paused and killed."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import redis
from celery.exceptions import TaskRevokedError

from sutra_tasks import DistillationConfig, distill, keys
from sutra_tasks.admission import Backlog
from sutra_tasks.distillation.material import gather
from sutra_tasks.distillation.run import Run
from sutra_tasks.errors import InvalidOptionError, ModelError, TooLittleTextError
from sutra_tasks.models.store import ModelStore
from sutra_tasks.settings import Settings
from tests.system.tiny_models import KINDS, build

WITHIN_S = 90


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Give a teacher of the specification's width, with random weights."""
    kind = replace(KINDS["bert"], hidden=1024)
    return build(kind, tmp_path_factory.mktemp("teacher"))


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
        "teacher": teacher, "texts": ("some.jsonl",), "name": "small", "layers": 1, "output_dim": 384,
        "max_epochs": 1, "held_out": 20, "max_texts": 120, "batch_size": 16, "learning_rate": 1e-3,
    }  # fmt: skip
    return DistillationConfig(**(given | changed))


def run_of(config: DistillationConfig, options: Settings, **more: Any) -> Run:
    store = ModelStore(Path(options.models_dir or ""))
    material = gather(config, options, ())
    return Run(config, material, options, store, **({"watch": lambda _: None} | more))


@pytest.mark.parametrize("width", [768, 384])
def test_a_teacher_of_1024_dimensions_is_distilled_to_the_specifications_widths(
    width: int, teacher: str, options: Settings
) -> None:
    from sentence_transformers import SentenceTransformer

    config = recipe(teacher, output_dim=width, pairs="pairs.jsonl", matryoshka=(64,))
    phases: list[str] = []
    run = run_of(config, options, watch=lambda told: phases.append(told["phase"]))
    assert run.made() is None
    made = run.make()
    store = ModelStore(Path(options.models_dir or ""))
    manifest, folder = store.manifest("small", 1), store.folder("small", 1)
    assert (made["model"], made["made"], made["bad_rows"]) == ("small@1", True, 2)
    assert (manifest.width, manifest.parent.model if manifest.parent else "") == (width, teacher)
    assert list(dict.fromkeys(phases)) == ["teacher", "student", "training", "measuring", "registering"]
    loaded = SentenceTransformer(str(folder), device="cpu", trust_remote_code=False)
    assert loaded.encode(["a text"]).shape == (1, width)
    report = json.loads((folder / "report.json").read_text())
    assert report["metrics"]["texts"] == 20
    assert 0 < report["metrics"]["cosine_similarity"] <= 1
    assert report["quality"]["ndcg_teacher"]["value"] > 0
    assert "some.jsonl:1501" in report["corpus"]["bad"][0]
    page = (folder / "report.html").read_text()
    assert "<svg" in page
    assert "http-equiv" in page or "Content-Security-Policy" in page
    card = (folder / "README.md").read_text()
    assert "some.jsonl" in card
    assert not list((Path(options.models_dir or "") / ".runs").glob(f"{run.fingerprint[:16]}*"))

    again = run_of(config, options).made()
    assert again is not None
    assert (again["model"], again["made"]) == ("small@1", False)
    assert run_of(replace(config, seed=1), options).made() is None


@pytest.mark.parametrize("student", ["static", "projection"])
def test_every_kind_of_student_is_made(student: str, teacher: str, options: Settings) -> None:
    config = recipe(teacher, student=student, layers=None, learning_rate=5e-3)
    made = run_of(config, options).make()
    report = json.loads(
        (ModelStore(Path(options.models_dir or "")).folder("small", 1) / "report.json").read_text()
    )
    assert made["space"] == report["student"]["space"]
    if student == "projection":
        assert report["quality"]["cosine"]["value"] == pytest.approx(1, abs=1e-3)


def test_what_was_not_named_by_the_deployment_is_no_teacher(options: Settings, tmp_path: Path) -> None:
    for name in (str(tmp_path), "../x", "bert-base-uncased"):
        with pytest.raises(InvalidOptionError, match="teacher"):
            run_of(recipe(name), options)


def test_too_little_text_is_refused_with_the_number_needed(teacher: str, options: Settings) -> None:
    with pytest.raises(TooLittleTextError) as refused:
        gather(recipe(teacher, held_out=600), options, ())
    assert (refused.value.needed, refused.value.bad_rows) == (1_800, 2)


def test_a_recipe_that_ends_its_workers_is_given_up_and_may_be_tried_anew(
    teacher: str, options: Settings
) -> None:
    def die(_: Any) -> None:
        raise KeyboardInterrupt

    run = run_of(recipe(teacher), options, watch=die)
    for _ in range(options.max_attempts):
        with pytest.raises(KeyboardInterrupt):
            run.make()
    with pytest.raises(ModelError, match="ended its worker 3 times"):
        run.make()
    with pytest.raises(KeyboardInterrupt):
        run.make()


@pytest.fixture
def worker(start_fleet: Callable[..., Any], options: Settings) -> Callable[..., Any]:
    """Return a fleet of a router and a distill worker."""

    def start() -> Any:
        folders = {"data_dir": options.data_dir, "models_dir": options.models_dir}
        return start_fleet(0, model=options.model, distill_pause_s=1.0, distill_threads=1, **folders)

    return start


def long(teacher: str, **changed: Any) -> DistillationConfig:
    more = {"max_texts": 800, "batch_size": 4, "max_epochs": 2, "checkpoint_steps": 20}
    return recipe(teacher, half_precision=False, **(more | changed))


def is_training(result: Any, beyond: int = 0) -> bool:
    info = result.info
    return isinstance(info, dict) and info.get("phase") == "training" and info["step"] > beyond


def test_a_killed_worker_goes_on_at_its_checkpoint_with_the_same_result(
    worker: Callable[..., Any], teacher: str, options: Settings, wait_until: Callable[..., None]
) -> None:
    from safetensors.numpy import load_file

    store = ModelStore(Path(options.models_dir or ""))
    with worker() as fleet:
        distill.delay(long(teacher, name="undisturbed")).get(timeout=WITHIN_S)
        result = distill.delay(long(teacher, name="killed"))
        step = 0
        for _ in range(2):
            wait_until(lambda: is_training(result, step + 60), within_s=WITHIN_S)  # noqa: B023
            step = result.info["step"]
            os.kill(fleet.pid("distill"), signal.SIGKILL)
        assert result.get(timeout=WITHIN_S)["model"] == "killed@1"
    one, other = (
        load_file(store.folder(name, 1) / "model.safetensors") for name in ("undisturbed", "killed")
    )
    assert max(np.abs(one[name] - other[name]).max() for name in one) <= 1e-4


def test_a_run_waits_for_a_saturated_fleet_and_ends_when_it_is_revoked(
    worker: Callable[..., Any], teacher: str, client: redis.Redis, wait_until: Callable[..., None]
) -> None:
    with worker():
        result = distill.delay(long(teacher, max_epochs=50))
        wait_until(lambda: is_training(result), within_s=WITHIN_S)

        def saturated() -> bool:  # routers say that nothing waits, once a second
            client.set(keys.BACKLOG, Backlog(10**6, 1000.0).to_json(), ex=5)
            return isinstance(result.info, dict) and result.info.get("phase") == "paused"

        wait_until(saturated, within_s=WITHIN_S)
        step = result.info["step"]
        wait_until(lambda: is_training(result, step), within_s=WITHIN_S)
        result.revoke()
        with pytest.raises(TaskRevokedError):
            result.get(timeout=WITHIN_S)
        # The worker is free again.
        with pytest.raises(InvalidOptionError):
            distill.delay(long(teacher, texts=("none.txt",))).get(timeout=WITHIN_S)
    client.delete(keys.BACKLOG)
