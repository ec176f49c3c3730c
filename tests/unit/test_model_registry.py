"""The registry: whole versions or none, one that serves, and no path that leads out of its folder."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sutra_tasks.errors import InvalidOptionError, ModelError, UnsupportedVersionError
from sutra_tasks.models.registry.layout import ABANDONED_S
from sutra_tasks.models.registry.manifest import Manifest, ParentModel, VersionFacts
from sutra_tasks.models.registry.model_registry import ModelRegistry

FACTS = VersionFacts(space="abc:384", width=384, golden='{"v": 1}', metrics={"cosine_similarity": 0.9})
NOW = 1.8e9


@pytest.fixture
def store(tmp_path: Path) -> ModelRegistry:
    (tmp_path / "models").mkdir()
    return ModelRegistry(tmp_path / "models", clock=lambda: NOW)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "made"
    (folder / "1_Dense").mkdir(parents=True)
    (folder / "modules.json").write_text("[]")
    (folder / "1_Dense" / "model.safetensors").write_bytes(b"weights" * 1000)
    return folder


@pytest.fixture
def filled(store: ModelRegistry, source: Path) -> ModelRegistry:
    """Return a registry with three versions of one model, none of which serves."""
    for space in ("abc:384", "def:384", "abc:384"):
        store.add("short", source, VersionFacts(space=space, width=384, golden="{}", metrics={}))
    return store


def visible(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "models" / "short").iterdir()}


# Adding.


def test_a_version_is_what_was_added_and_what_was_said_of_it(store: ModelRegistry, source: Path) -> None:
    facts = VersionFacts(
        space="abc:2", width=2, golden="g", parent=ParentModel("t", "u:4"), metrics={"spearman": 0.5},
        recipe={"alpha": 0.5}, fingerprint="f",
    )  # fmt: skip
    made = store.add("short", source, facts)
    assert (made.name, made.version, made.created_at) == ("short", 1, NOW)
    assert set(made.files) == {"modules.json", "1_Dense/model.safetensors"}
    assert made.bytes == 2 + 7000
    assert store.manifest("short", 1) == made
    assert {name: getattr(made, name) for name in VersionFacts.__dataclass_fields__} == {
        name: getattr(facts, name) for name in VersionFacts.__dataclass_fields__
    }
    folder = store.folder("short", 1)
    assert (folder / "1_Dense" / "model.safetensors").read_bytes() == b"weights" * 1000
    assert all(path.stat().st_mode & 0o777 == 0o444 for path in folder.rglob("*") if path.is_file())
    assert folder.stat().st_mode & 0o777 == 0o755
    store.verify("short", 1)


def test_versions_are_numbered_and_none_serves_by_itself(filled: ModelRegistry) -> None:
    assert filled.names() == ("short",)
    assert [one.version for one in filled.versions("short")] == [1, 2, 3]
    assert filled.current("short") is None
    assert filled.versions("other") == []


def test_a_version_can_be_added_again_as_another(filled: ModelRegistry) -> None:
    made = filled.add("other", filled.folder("short", 1), FACTS)
    assert "manifest.json" not in made.files
    assert made.name == "other"
    filled.verify("other", 1)


def test_of_a_link_to_a_file_the_file_is_added(
    store: ModelRegistry, source: Path, tmp_path: Path
) -> None:
    (tmp_path / "blob").write_text("{}")
    (source / "config.json").symlink_to(tmp_path / "blob")
    store.add("short", source, FACTS)
    assert not (store.folder("short", 1) / "config.json").is_symlink()
    store.verify("short", 1)


def test_links_to_folders_and_what_is_no_file_are_refused(
    store: ModelRegistry, source: Path, tmp_path: Path
) -> None:
    up = source / "up"
    for fifo in (False, True):
        if fifo:
            os.mkfifo(up)
        else:
            up.symlink_to(tmp_path)
        with pytest.raises(ModelError, match="up is"):
            store.add("short", source, FACTS)
        up.unlink()
    assert visible(tmp_path) == set()


@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_a_source_without_files_is_refused(store: ModelRegistry, tmp_path: Path, kind: str) -> None:
    place = tmp_path / "nothing"
    if kind == "empty":
        place.mkdir()
    elif kind == "file":
        place.write_text("x")
    with pytest.raises(ModelError, match="nothing"):
        store.add("short", place, FACTS)
    assert store.names() == ()


def test_facts_that_no_manifest_may_hold_add_nothing(
    store: ModelRegistry, source: Path, tmp_path: Path
) -> None:
    for wrong in ({"metrics": {"mse": float("nan")}}, {"space": ""}, {"width": 0}):
        given: dict[str, Any] = {"space": "a:1", "width": 1, "golden": "g", "metrics": {}, **wrong}
        with pytest.raises(ModelError):
            store.add("short", source, VersionFacts(**given))
    assert visible(tmp_path) == set()


def fails(code: int) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("name", ["fsync", "fchmod", "rename"])
def test_a_full_disk_leaves_nothing_half_written(
    filled: ModelRegistry, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    before = visible(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, name, fails(errno.ENOSPC))
        with pytest.raises(ModelError, match=r"No space left.*room"):
            filled.add("short", source, FACTS)
    assert visible(tmp_path) == before
    assert filled.add("short", source, FACTS).version == 4


def test_what_a_crash_left_is_removed_after_a_day_and_never_seen(
    filled: ModelRegistry, source: Path, tmp_path: Path
) -> None:
    home = tmp_path / "models" / "short"
    for name, age_s in ((".incoming-old", ABANDONED_S + 1), (".incoming-new", ABANDONED_S - 1)):
        (home / name).mkdir()
        (home / name / "part").write_text("half")
        os.utime(home / name, (NOW - age_s, NOW - age_s))
    assert len(filled.versions("short")) == 3
    assert filled.add("short", source, FACTS).version == 4
    assert visible(tmp_path) == {"1", "2", "3", "4", ".incoming-new"}
    (tmp_path / "models" / "begun" / ".incoming-x").mkdir(parents=True)
    assert filled.names() == ("short",)


# Which serves.


def test_the_version_that_serves_is_promoted_and_rolled_back(filled: ModelRegistry) -> None:
    assert filled.promote("short", 1) is None
    assert filled.promote("short", 3) == 1
    assert filled.promote("short", 3) == 3
    assert filled.promote("short", 2) == 3
    assert filled.current("short") == 2
    assert filled.rollback("short") == 3
    assert filled.rollback("short") == 1
    with pytest.raises(ModelError, match="before"):
        filled.rollback("short")
    assert filled.current("short") == 1


def test_a_rollback_passes_over_what_was_removed_and_what_serves(filled: ModelRegistry) -> None:
    for version in (2, 1, 3, 1):
        filled.promote("short", version)
    filled.remove("short", 3)
    assert filled.rollback("short") == 2
    with pytest.raises(ModelError, match="before"):
        filled.rollback("short")


def test_only_a_version_that_is_there_can_be_promoted(filled: ModelRegistry) -> None:
    with pytest.raises(ModelError, match=r"versions 1, 2, 3"):
        filled.promote("short", 4)
    with pytest.raises(ModelError, match="none of it"):
        filled.promote("other", 1)
    with pytest.raises(ModelError, match="none of it"):
        filled.rollback("other")


def test_a_write_that_fails_leaves_the_old_version_serving(
    filled: ModelRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled.promote("short", 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails(errno.EDQUOT))
        with pytest.raises(ModelError, match="quota"):
            filled.promote("short", 2)
    assert filled.current("short") == 1
    filled.promote("short", 2)
    assert filled.current("short") == 2


def test_a_reference_is_a_name_or_a_name_and_a_version(filled: ModelRegistry) -> None:
    assert filled.resolve("short@3") == ("short", 3)
    with pytest.raises(ModelError, match="promote"):
        filled.resolve("short")
    filled.promote("short", 2)
    assert filled.resolve("short") == ("short", 2)
    for wrong in ("short@4", "short@", "short@0", "short@-1", "short@1@1", "short@x", "short@01", "o@1"):
        with pytest.raises(ModelError):
            filled.resolve(wrong)


def test_a_space_finds_the_newest_version_that_gives_it_whatever_the_cut(filled: ModelRegistry) -> None:
    assert filled.by_space("short", "abc:384") == 3
    assert filled.by_space("short", "def:384") == 2
    assert filled.by_space("short", "def:128") == 2
    assert filled.by_space("short", "ghi:384") is None
    assert filled.by_space("other", "abc:384") is None


RECORDS = [b"", b"{", b"[]", b'{"v": 1}', b'{"v": 1, "version": 1, "history": []}',
           b'{"v": 1, "version": 1, "history": [2]}', b'{"v": 1, "version": true, "history": [true]}',
           b'{"v": 1, "version": "../x", "history": ["../x"]}']  # fmt: skip


@pytest.mark.parametrize("record", RECORDS)
def test_a_damaged_record_is_an_error_with_a_remedy(
    filled: ModelRegistry, tmp_path: Path, record: bytes
) -> None:
    current = tmp_path / "models" / "short" / "current"
    current.write_bytes(record)
    for ask in (filled.current, filled.resolve, filled.rollback):
        with pytest.raises(ModelError, match="Delete it"):
            ask("short")
    current.write_text(json.dumps({"v": 2, "version": 1}))
    with pytest.raises(UnsupportedVersionError):
        filled.current("short")


# Removing and verifying.


def test_a_version_is_removed_unless_it_serves_and_its_number_is_not_given_again(
    filled: ModelRegistry, source: Path
) -> None:
    filled.promote("short", 1)
    with pytest.raises(ModelError, match="serves"):
        filled.remove("short", 1)
    filled.remove("short", 3)
    assert [one.version for one in filled.versions("short")] == [1, 2]
    with pytest.raises(ModelError):
        filled.remove("short", 3)
    assert filled.add("short", source, FACTS).version == 4


def damage(kind: str, file: Path) -> None:
    file.chmod(0o644)
    if kind == "changed":
        file.write_bytes(file.read_bytes()[:-1] + b"!")
    elif kind == "longer":
        file.write_bytes(file.read_bytes() + b"!")
    elif kind == "missing":
        file.unlink()
    elif kind == "extra":
        file.with_name("custom_code.py").write_text("import os")
    elif kind == "linked":
        file.rename(file.with_name("moved"))
        file.symlink_to("moved")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("changed", "1_Dense/model.safetensors was changed"),
        ("longer", "1_Dense/model.safetensors was changed"),
        ("missing", "1_Dense/model.safetensors is missing"),
        ("extra", "1_Dense/custom_code.py was not there"),
        ("linked", "1_Dense/model.safetensors is a link"),
    ],
)
def test_a_file_that_differs_is_named(filled: ModelRegistry, kind: str, said: str) -> None:
    damage(kind, filled.folder("short", 2) / "1_Dense" / "model.safetensors")
    with pytest.raises(ModelError, match=said):
        filled.verify("short", 2)
    filled.verify("short", 1)


def test_a_manifest_of_another_version_is_refused(filled: ModelRegistry) -> None:
    path = filled.folder("short", 2) / "manifest.json"
    path.chmod(0o644)
    path.write_bytes((filled.folder("short", 1) / "manifest.json").read_bytes())
    with pytest.raises(ModelError, match="short@1"):
        filled.manifest("short", 2)
    path.write_text("{}")
    with pytest.raises(UnsupportedVersionError):
        filled.versions("short")
    path.unlink()
    with pytest.raises(ModelError, match="No such file"):
        filled.verify("short", 2)


# Paths.


@pytest.mark.parametrize("name", ["..", "../short", "/etc", "a/b", ".hidden", "", "a\0b", "short/1"])
def test_no_name_leads_out_of_the_folder(filled: ModelRegistry, source: Path, name: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: filled.add(name, source, FACTS), lambda: filled.folder(name, 1),
        lambda: filled.manifest(name, 1), lambda: filled.current(name), lambda: filled.versions(name),
        lambda: filled.promote(name, 1), lambda: filled.rollback(name), lambda: filled.remove(name, 1),
        lambda: filled.verify(name, 1), lambda: filled.resolve(name), lambda: filled.by_space(name, "a"),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(InvalidOptionError):
            call()


def test_a_version_that_cannot_be_read_hides_no_other(
    filled: ModelRegistry, source: Path, tmp_path: Path
) -> None:
    spaces = [one.space for one in filled.versions("short")]
    path = filled.folder("short", 2) / "manifest.json"
    path.chmod(0o644)
    for damaged in ("{}", "not JSON"):
        path.write_text(damaged)
        assert filled.by_space("short", spaces[-1]) == 3
    filled.add("other", source, FACTS)
    (tmp_path / "models" / "short" / "9").symlink_to(source)
    assert filled.names() == ("other", "short")
    assert filled.has("other")
    with pytest.raises(ModelError, match=r"short@9.*link"):
        filled.has("short")


def test_links_in_the_registry_are_refused(filled: ModelRegistry, source: Path, tmp_path: Path) -> None:
    root = tmp_path / "models"
    (root / "linked").symlink_to(root / "short")
    assert filled.names() == ("short",)
    for call in (filled.versions, filled.current, filled.rollback, filled.resolve):
        with pytest.raises(ModelError, match="link"):
            call("linked")
    with pytest.raises(ModelError, match="link"):
        filled.add("linked", source, FACTS)
    (root / "short" / "9").symlink_to(source)
    with pytest.raises(ModelError, match=r"short@9.*link"):
        filled.folder("short", 9)
    (root / "short" / "9").unlink()
    (root / "short" / "current").symlink_to(source / "modules.json")
    with pytest.raises(ModelError, match="link"):
        filled.current("short")


def test_a_link_as_lock_is_refused(filled: ModelRegistry, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    (tmp_path / "models" / "short" / ".lock").symlink_to(victim)
    with pytest.raises(ModelError):
        filled.promote("short", 1)
    assert not victim.exists()


def test_a_missing_folder_is_named(tmp_path: Path, source: Path) -> None:
    store = ModelRegistry(tmp_path / "unmounted")
    calls: list[Callable[[], object]] = [
        store.names, lambda: store.versions("short"), lambda: store.current("short"),
        lambda: store.add("short", source, FACTS), lambda: store.promote("short", 1),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(ModelError, match=r"unmounted.*SUTRA_MODELS_DIR"):
            call()


@pytest.mark.parametrize("name", ["mkdir", "scandir", "open"])
def test_a_folder_that_may_not_be_used_is_named(
    filled: ModelRegistry, source: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, name, fails(errno.EACCES))
        with pytest.raises(ModelError, match=r"Permission denied.*SUTRA_MODELS_DIR"):
            filled.add("short", source, FACTS)


# Several at once.

TOGETHER = """
import sys
from pathlib import Path
from sutra_tasks.models.registry.manifest import VersionFacts
from sutra_tasks.models.registry.model_registry import ModelRegistry
root, source, me = sys.argv[1:]
store = ModelRegistry(Path(root))
facts = VersionFacts(space=f"s{me}:1", width=1, golden="g", metrics={})
print("ready", flush=True)
sys.stdin.readline()
for turn in range(12):
    made = store.add("short", Path(source), facts)
    assert store.manifest("short", made.version).space == f"s{me}:1"
    store.promote("short", made.version)
    print(made.version, flush=True)
"""


def test_writers_at_once_get_versions_of_their_own_and_lose_no_promotion(
    store: ModelRegistry, source: Path, tmp_path: Path
) -> None:
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, str(tmp_path / "models"), str(source), str(me)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for me in range(3)
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    said = []
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("\n")
        writer.stdin.flush()
    for writer in writers:
        out, _ = writer.communicate(timeout=60)
        assert writer.returncode == 0
        said += [int(line) for line in out.split()]
    assert sorted(said) == list(range(1, 37))
    record = json.loads((tmp_path / "models" / "short" / "current").read_text())
    assert sorted(record["history"]) == list(range(1, 37))
    for made in store.versions("short"):
        assert isinstance(made, Manifest)
        store.verify("short", made.version)
    assert not {name for name in visible(tmp_path) if name.startswith(".incoming")}


INTERRUPTED = """
import os, sys
from pathlib import Path
from sutra_tasks.models.registry import model_registry as module
from sutra_tasks.models.registry.manifest import VersionFacts
from sutra_tasks.models.registry.model_registry import ModelRegistry
step = sys.argv[3]
def die(*_, **__): os._exit(9)
if step == "write_whole": module.write_whole = die
elif step == "rename": Path.rename = die
store = ModelRegistry(Path(sys.argv[1]))
store.add("short", Path(sys.argv[2]), VersionFacts(space="a:1", width=1, golden="g", metrics={}))
"""


@pytest.mark.parametrize("step", ["write_whole", "rename"])
def test_a_writer_that_is_killed_leaves_nothing_that_is_seen(
    filled: ModelRegistry, source: Path, tmp_path: Path, step: str
) -> None:
    arguments = [str(tmp_path / "models"), str(source), step]
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, *arguments], check=False)
    assert done.returncode == 9
    assert [one.version for one in filled.versions("short")] == [1, 2, 3]
    assert filled.add("short", source, FACTS).version == 4
