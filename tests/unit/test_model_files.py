"""A model's files are checked before a library reads them, and the sentence names the one at fault."""

import json
import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sutra_tasks.engines.model_files import check_files
from sutra_tasks.engines.model_folder import locate
from sutra_tasks.errors import ModelError

OF_US = "sentence_transformers.models."
NOBODY = 65534


def weights(size: int = 8, said: int = 8) -> bytes:
    header = json.dumps(
        {"__metadata__": {}, "w": {"dtype": "F32", "shape": [2], "data_offsets": [0, said]}}
    ).encode()
    return struct.pack("<Q", len(header)) + header + bytes(size)


FILES: dict[str, bytes] = {
    "modules.json": json.dumps(
        [
            {"type": f"{OF_US}Transformer", "path": ""},
            {"type": f"{OF_US}Pooling", "path": "1_Pooling"},
            {"type": f"{OF_US}Dense", "path": "2_Dense"},
            {"type": f"{OF_US}Normalize", "path": "3_Normalize"},
        ]
    ).encode(),
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "model.safetensors": weights(),
    "1_Pooling/config.json": b'{"word_embedding_dimension": 8}',
    "2_Dense/config.json": b"{}",
    "2_Dense/model.safetensors": weights(),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "m", FILES)


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def fault(folder: Path) -> str:
    with pytest.raises(ModelError) as refused:
        check_files("m", folder)
    said = str(refused.value)
    assert "\n" not in said
    return said


def test_a_whole_folder_has_no_fault(folder: Path) -> None:
    check_files("m", folder)


def test_a_plain_transformer_needs_no_modules(tmp_path: Path) -> None:
    plain = ("config.json", "tokenizer.json", "model.safetensors")
    check_files("m", write(tmp_path / "m", {name: FILES[name] for name in plain}))


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_missing_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert f"lacks {name}" in fault(folder)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\x00" * 40, b"[" * 100_000])
def test_a_file_that_is_damaged_is_named(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    assert f"{folder / name} is " in fault(folder)


@pytest.mark.parametrize("size", [0, 7, 9])
def test_weights_that_are_cut_off_are_told_by_their_header(folder: Path, size: int) -> None:
    (folder / "2_Dense" / "model.safetensors").write_bytes(weights(size))
    said = fault(folder)
    assert f"2_Dense/model.safetensors has {size} bytes of weights, and its header says 8" in said


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "modules.json"])
def test_a_pointer_in_the_place_of_a_file_is_told_by_what_left_it_there(folder: Path, name: str) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 90868376\n"
    (folder / name).write_text(pointer)
    assert f"{name} is a pointer of Git LFS" in fault(folder)


def test_old_weights_are_no_safetensors_and_may_be_pointers_too(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    check_files("m", folder)
    (folder / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "pytorch_model.bin is a pointer of Git LFS" in fault(folder)


def test_files_that_are_none_of_the_model_may_be_in_any_state(folder: Path) -> None:
    for name in ("notes.json", "training.safetensors", "1_Pooling/notes.json", "train.py"):
        (folder / name).write_bytes(b"{")
    os.mkfifo(folder / "log.json")
    check_files("m", folder)


def test_a_shard_that_is_missing_or_cut_off_is_named(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    shards = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(shards))
    assert "lacks two.safetensors" in fault(folder)
    (folder / "two.safetensors").write_bytes(weights(7))
    assert "two.safetensors has 7 bytes of weights" in fault(folder)


def test_a_pipe_is_not_waited_for(folder: Path) -> None:
    for name in ("modules.json", "config.json", "model.safetensors"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        assert f"{name} is not a plain file" in fault(folder)
        (folder / name).unlink()
        (folder / name).write_bytes(FILES[name])


@pytest.mark.parametrize("modules", ["{}", "7", "null", '["Transformer"]', '[{"type": 1, "path": ""}]'])
def test_modules_that_are_no_modules_are_told(folder: Path, modules: str) -> None:
    (folder / "modules.json").write_text(modules)
    assert "no list of modules" in fault(folder)


@pytest.mark.parametrize("kind", ["people.Pooling", "Pooling", "sentence_transformersx.models.Pooling"])
def test_a_module_with_code_of_its_own_is_named(folder: Path, kind: str) -> None:
    modules = [{"type": f"{OF_US}Transformer", "path": ""}, {"type": kind, "path": "1_Pooling"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    assert f"its module {kind} is code of its own (trust_remote_code)" in fault(folder)


@contextmanager
def as_nobody() -> Iterator[None]:
    """Run a block as a user whom permissions bind."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_folder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give a copy of the folder where every user may look."""
    place = Path("/tmp") / f"{tmp_path_factory.getbasetemp().name}-model-files"
    shutil.copytree(folder, place / "m")
    yield place / "m"
    for path in [place / "m", *place.rglob("*")]:
        path.chmod(0o755)
    shutil.rmtree(place)


@pytest.mark.parametrize("name", ["", "1_Pooling", "config.json", "model.safetensors"])
def test_what_this_user_may_not_read_is_named(open_folder: Path, name: str) -> None:
    (open_folder / name).chmod(0)
    with as_nobody():
        assert f"{open_folder / name}" in fault(open_folder)
        assert "Permission denied. May this user read it" in fault(open_folder)


def test_a_folder_behind_one_that_this_user_may_not_enter_is_told(open_folder: Path) -> None:
    open_folder.parent.chmod(0)
    with as_nobody(), pytest.raises(ModelError, match="Permission denied"):
        locate(str(open_folder))


@pytest.mark.parametrize(
    ("name", "said"), [("/no/where", "no folder"), ("./m", "no folder"), ("~/no/m", "no folder")]
)
def test_a_path_without_a_folder_is_not_looked_for_elsewhere(name: str, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        locate(name)


def test_a_file_is_no_folder(folder: Path) -> None:
    with pytest.raises(ModelError, match="is a file"):
        locate(str(folder / "config.json"))


def test_what_only_looks_like_an_index_is_none(folder: Path) -> None:
    broken: list[Any] = [7, [], {"weight_map": []}]
    for index in broken:
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        fault(folder)
