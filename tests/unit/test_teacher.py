"""A teacher is known without being loaded, as long as its files are the same."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sutra_tasks.distillation.data.teacher import Teacher
from sutra_tasks.errors import InvalidOptionError, ModelError
from sutra_tasks.models.registry.manifest import VersionFacts
from sutra_tasks.models.registry.model_registry import ModelRegistry
from sutra_tasks.settings import Settings


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "registry").mkdir()
    (tmp_path / "tiny" / "weights").write_text("1")
    return tmp_path / "tiny"


class Loads:
    """Loads a model that gives a space."""

    def __init__(self, space: str) -> None:
        self.space, self.count = space, 0

    def __call__(self, *_: object) -> Any:
        self.count += 1
        return SimpleNamespace(info=SimpleNamespace(space=self.space))


def teacher(folder: Path, loads: Loads, name: str | None = None) -> Teacher:
    options = Settings(model=str(folder), models_dir=str(folder.parent / "registry"))
    store = ModelRegistry(folder.parent / "registry")
    return Teacher(name or str(folder), options, store, folder.parent / "runs", load=loads)


def test_the_space_of_a_teacher_is_remembered(folder: Path) -> None:
    loads = Loads("a:8")
    assert teacher(folder, loads).space == "a:8"
    assert teacher(folder, loads).space == "a:8"
    assert loads.count == 1


def test_a_teacher_is_loaded_once(folder: Path) -> None:
    loads = Loads("a:8")
    one = teacher(folder, loads)
    assert one.space == one.encoder.info.space
    assert one.encoder is one.encoder
    assert loads.count == 1


def test_the_space_of_other_files_is_not_that_of_these(folder: Path) -> None:
    assert teacher(folder, Loads("a:8")).space == "a:8"
    (folder / "weights").write_text("22")
    assert teacher(folder, Loads("b:8")).space == "b:8"


def test_a_teacher_that_is_not_what_was_remembered_is_refused(folder: Path) -> None:
    assert teacher(folder, Loads("a:8")).space == "a:8"
    with pytest.raises(ModelError, match="gives the space b:8, and gave a:8"):
        _ = teacher(folder, Loads("b:8")).encoder


def test_of_a_version_of_the_registry_the_manifest_says_the_space(folder: Path) -> None:
    facts = VersionFacts(space="r:8", width=8, golden="{}", metrics={})
    ModelRegistry(folder.parent / "registry").add("search", folder, facts)
    loads = Loads("r:8")
    one = teacher(folder, loads, "search@1")
    assert (one.space, one.folder.name, loads.count) == ("r:8", "1", 0)


def test_no_model_that_was_not_named_is_a_teacher(folder: Path) -> None:
    with pytest.raises(InvalidOptionError, match="teacher"):
        teacher(folder, Loads("a:8"), "../tiny")
