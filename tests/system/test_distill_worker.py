"""Distillations as tasks, on a worker that is killed, stopped, paused and cut off from its server."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import redis
import torch
from celery.exceptions import TaskRevokedError

from sutra_tasks import DistillationConfig, distill, keys
from sutra_tasks.client.admission import Backlog
from sutra_tasks.distillation.data.run_texts import read_run_texts
from sutra_tasks.distillation.worker.run import DistillationRun
from sutra_tasks.errors import InvalidOptionError
from sutra_tasks.models.registry.model_registry import ModelRegistry
from sutra_tasks.settings import Settings
from tests.system.conftest import BRISK, ROOT
from tests.system.durable_server import DurableServer
from tests.system.local_fleet import LocalFleet, local_fleet
from tests.system.tiny_models import KINDS, build

WITHIN_S = 90
WORDS = " ".join(topics.values()).split()


@pytest.fixture
def options(tmp_path: Path) -> Settings:
    """Name folders with a teacher, some texts and an empty registry."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "models").mkdir()
    teacher = build(replace(KINDS["bert"], hidden=512), tmp_path / "teacher")
    add_texts(tmp_path / "texts", 0)
    return Settings(
        model=teacher, data_dir=str(tmp_path / "texts"), models_dir=str(tmp_path / "models"),
        distill_pause_s=1.0, distill_threads=1, **BRISK,
    )  # fmt: skip


def add_texts(folder: Path, first: int) -> None:
    lines = (" ".join(WORDS[at : at + 6]) for at in range(6 * first, 6 * (first + 500), 6))
    with (folder / "some.txt").open("a") as file:
        file.writelines(f"{line}\n" for line in lines)


def recipe(options: Settings, **changed: Any) -> DistillationConfig:
    given: dict[str, Any] = {
        "teacher": options.model, "texts": ("some.txt",), "name": "small", "layers": 1,
        "output_dim": 64, "max_epochs": 3, "patience": 50, "held_out": 20, "max_texts": 400,
        "batch_size": 4, "learning_rate": 1e-3, "checkpoint_steps": 20, "half_precision": False,
    }  # fmt: skip
    return DistillationConfig(**(given | changed))


def store_of(options: Settings) -> ModelRegistry:
    return ModelRegistry(Path(options.models_dir or ""))


@contextmanager
def worker(options: Settings, client: redis.Redis, folder: Path) -> Iterator[LocalFleet]:
    """Run a router and a distill worker."""
    with local_fleet(options, client, folder, devices=0) as fleet:
        yield fleet


def is_training(result: Any, beyond: int = 0) -> bool:
    try:
        info = result.info
    except redis.ConnectionError:
        return False
    return isinstance(info, dict) and info.get("phase") == "training" and info["step"] > beyond


def test_a_run_that_is_killed_stopped_and_cut_off_gives_the_same_student(
    durable: tuple[DurableServer, redis.Redis],
    options: Settings,
    tmp_path: Path,
    wait_until: Callable[..., None],
) -> None:
    from safetensors.numpy import load_file

    server, client = durable
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = recipe(options, name="undisturbed")
    DistillationRun(
        alone, read_run_texts(alone, options, ()), options, store_of(options), report=lambda _: None
    ).make()
    torch.set_num_threads(threads)

    with worker(replace(options, broker_url=server.address), client, tmp_path) as fleet:
        result = distill.delay(recipe(options, name="disturbed"))
        step = 0
        for disturb in (signal.SIGKILL, server, signal.SIGTERM):
            wait_until(lambda: is_training(result, step + 25), within_s=WITHIN_S)  # noqa: B023
            step = result.info["step"]
            if isinstance(disturb, DurableServer):
                with fleet.lock:
                    server.stop()
                    server.start()
            else:
                os.kill(fleet.pid("distill"), disturb)
        assert result.get(timeout=WITHIN_S)["model"] == "disturbed@1"
    one, other = (
        load_file(store_of(options).folder(name, 1) / "model.safetensors")
        for name in ("undisturbed", "disturbed")
    )
    assert max(np.abs(one[name] - other[name]).max() for name in one) <= 1e-4


def test_a_run_waits_for_a_saturated_fleet_and_ends_when_it_is_revoked(
    client: redis.Redis, server: str, options: Settings, tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    with worker(replace(options, broker_url=server), client, tmp_path):
        result = distill.delay(recipe(options, max_epochs=50))
        wait_until(lambda: is_training(result), within_s=WITHIN_S)

        def saturated() -> bool:  # routers say that nothing waits, once a second
            client.set(keys.backlog(), Backlog(10**6, 1000.0).to_json(), ex=5)
            return isinstance(result.info, dict) and result.info.get("phase") == "paused"

        wait_until(saturated, within_s=WITHIN_S)
        step = result.info["step"]
        wait_until(lambda: is_training(result, step), within_s=WITHIN_S)
        result.revoke(terminate=True)  # as for any call, a revocation that kills nothing
        with pytest.raises(TaskRevokedError):
            result.get(timeout=WITHIN_S)
        # The worker is free again.
        with pytest.raises(InvalidOptionError):
            distill.delay(recipe(options, texts=("none.txt",))).get(timeout=WITHIN_S)
    client.delete(keys.backlog())


def test_two_schedulers_make_one_version_of_the_same_texts_and_another_of_more(
    client: redis.Redis, server: str, options: Settings, tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(recipe(options, student="projection", layers=None).to_json()))
    due = replace(options, broker_url=server, distill_every_s=2.0, distill_config=str(file))

    def skipped() -> int:
        stored: Any = [client.get(key) for key in client.scan_iter("celery-task-meta-*")]
        results = [json.loads(one)["result"] for one in stored if one is not None]
        return sum(one.get("made") is False for one in results if isinstance(one, dict))

    def versions() -> list[int]:
        return [one.version for one in store_of(options).versions("small")]

    with worker(due, client, tmp_path), schedulers(due, tmp_path, 2):
        wait_until(lambda: skipped() >= 2, within_s=WITHIN_S)
        assert versions() == [1]
        add_texts(Path(options.data_dir or ""), 500)
        wait_until(lambda: len(versions()) == 2, within_s=WITHIN_S)
        before = skipped()
        wait_until(lambda: skipped() >= before + 2, within_s=WITHIN_S)
        assert versions() == [1, 2]


@contextmanager
def schedulers(options: Settings, folder: Path, count: int) -> Iterator[None]:
    """Run Celery's beat, more than once."""
    started = []
    try:
        for number in range(count):
            command = [
                sys.executable, "-m", "celery", "-A", "sutra_tasks", "--quiet", "beat",
                f"--schedule={folder}/beat-{number}", "--pidfile=",
            ]  # fmt: skip
            started.append(subprocess.Popen(command, cwd=ROOT, env={**os.environ, **options.as_env()}))
        yield
    finally:
        for one in started:
            one.terminate()
        for one in started:
            one.wait(20)
