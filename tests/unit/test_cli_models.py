"""``sutra models``: nothing moves before it is known that it can, and what has moved is said."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sutra_tasks.cli import models as command
from sutra_tasks.engines import golden
from sutra_tasks.engines import load as engines
from sutra_tasks.errors import BrokerNotConfiguredError, ModelError, SutraError
from sutra_tasks.models.registry.manifest import VersionFacts
from sutra_tasks.models.registry.model_registry import ModelRegistry
from sutra_tasks.settings import Settings
from tests.hanging import hanging, needs_leases


@pytest.fixture
def options(tmp_path: Path) -> Settings:
    (tmp_path / "registry").mkdir()
    return Settings(models_dir=str(tmp_path / "registry"), broker_url="redis://127.0.0.1:1/0")


@pytest.fixture
def store(options: Settings, tmp_path: Path) -> ModelRegistry:
    """Three versions of a model, of which the second serves and the first did."""
    source, found = tmp_path / "source", ModelRegistry(Path(options.models_dir or ""))
    source.mkdir()
    for number in range(1, 4):
        (source / "weights").write_text(str(number))
        found.add("search", source, VersionFacts(space=f"s{number}", width=8, golden="{}", metrics={}))
    found.promote("search", 1)
    found.promote("search", 2)
    return found


def connect(monkeypatch: pytest.MonkeyPatch, behind: str = "") -> None:
    def wait_until_served(*_: object) -> None:
        if behind:
            raise SutraError(behind)

    monkeypatch.setattr(command, "connected", lambda _: None)
    monkeypatch.setattr(command, "wait_until_served", wait_until_served)


def test_a_rollback_goes_back(
    options: Settings, store: ModelRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect(monkeypatch)
    command.run_rollback(options, "search")
    assert store.current("search") == 1


def test_a_rollback_without_its_server_moves_nothing(options: Settings, store: ModelRegistry) -> None:
    with pytest.raises(SutraError, match="does not answer"):
        command.run_rollback(options, "search")
    with pytest.raises(BrokerNotConfiguredError):
        command.run_rollback(Settings(models_dir=options.models_dir), "search")
    assert store.current("search") == 2


def test_a_rollback_to_damaged_files_moves_nothing(
    options: Settings, store: ModelRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect(monkeypatch)
    weights = store.folder("search", 1) / "weights"
    weights.chmod(0o644)
    weights.write_text("damaged")
    with pytest.raises(ModelError, match="search@1"):
        command.run_rollback(options, "search")
    assert store.current("search") == 2


def test_a_rollback_to_nothing_is_refused(
    options: Settings, store: ModelRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect(monkeypatch)
    command.run_rollback(options, "search")
    for name in ("search", "none"):
        with pytest.raises(ModelError, match="no version of it"):
            command.run_rollback(options, name)


def test_a_rollback_that_devices_do_not_follow_says_what_serves_now(
    options: Settings, store: ModelRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect(monkeypatch, behind="gpu0 does not")
    with pytest.raises(SutraError, match=r"the registry went back: search@1 .*gpu0 does not"):
        command.run_rollback(options, "search")
    assert store.current("search") == 1


def test_what_is_added_is_measured_and_not_simulated(
    options: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("1")
    info = SimpleNamespace(space="real:8", width=8)

    def load_engine(given: Settings, *_: Any) -> Any:
        assert given.engine == "torch"
        return SimpleNamespace(info=info)

    monkeypatch.setattr(engines, "load_engine", load_engine)
    vectors = np.ones((5, 8), dtype=np.float32)
    made = golden.GoldenVectors("real:8", vectors)
    monkeypatch.setattr(golden.GoldenVectors, "of", lambda _: made)
    simulated = Settings(models_dir=options.models_dir, engine="simulated")
    vectors[2] = np.nan
    with pytest.raises(ModelError, match="not numbers"):
        command.run_add(simulated, "search", str(tmp_path / "model"))
    vectors[2] = 0
    command.run_add(simulated, "search", str(tmp_path / "model"))
    assert ModelRegistry(Path(options.models_dir or "")).manifest("search", 1).space == "real:8"


def test_a_list_shows_what_can_be_read_and_names_what_cannot(
    options: Settings,
    store: ModelRegistry,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("docs", "other"):
        store.add(name, tmp_path / "source", VersionFacts(space="s", width=8, golden="{}", metrics={}))
    manifest = store.folder("docs", 1) / "manifest.json"
    manifest.chmod(0o644)
    manifest.write_text("{")
    command.run_list(options, None, as_json=False)
    shown = capsys.readouterr()
    assert [f"search@{at}" in shown.out for at in (1, 2, 3)] == [True] * 3
    assert "other@1" in shown.out
    assert "manifest is not JSON" in " ".join(shown.err.split())
    with pytest.raises(ModelError, match="not JSON"):
        command.run_list(options, "docs", as_json=False)


@needs_leases
def test_a_list_does_not_wait_for_a_model_whose_storage_hangs(
    options: Settings,
    store: ModelRegistry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command, "STORAGE_S", 0.2)
    store.add("docs", tmp_path / "source", VersionFacts(space="s", width=8, golden="{}", metrics={}))
    with hanging(store.folder("docs", 1) / "manifest.json"):
        command.run_list(options, None, as_json=True)
        shown = capsys.readouterr()
    assert [one["name"] for one in json.loads(shown.out)] == ["search"] * 3
    assert "docs: its files cannot be read" in shown.err
