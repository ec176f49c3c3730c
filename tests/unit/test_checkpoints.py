"""Checkpoints: what was written comes back exactly, and what was half written is never read."""

import itertools
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as laws
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.numpy import save_file

from sutra_tasks.distillation.config import DistillationConfig
from sutra_tasks.distillation.training import checkpoints
from sutra_tasks.distillation.training.checkpoints import Checkpoint, due, latest, read_tensors, write

ARRAYS: st.SearchStrategy[Any] = st.sampled_from(["<f4", "<i8", "u1"]).flatmap(
    lambda dtype: arrays.arrays(
        np.dtype(dtype), arrays.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=4)
    )
)
TENSORS = st.dictionaries(st.text("abcdef./_", min_size=1, max_size=12), ARRAYS, max_size=4)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def made(step: int, fill: float = 0.5) -> Checkpoint:
    return Checkpoint(step, step // 10, {"model/a": np.full((3, 2), fill)}, {"best": 0.1 + 0.2})


def found(folder: Path) -> Checkpoint:
    checkpoint = latest(folder)
    assert checkpoint is not None
    return checkpoint


@laws(max_examples=40, deadline=None)
@given(tensors=TENSORS, scalars=st.dictionaries(st.text(), JSON, max_size=3), step=st.integers(0, 10**8))
def test_what_was_written_comes_back_exactly(
    tmp_path_factory: pytest.TempPathFactory, tensors: Any, scalars: Any, step: int
) -> None:
    folder = tmp_path_factory.mktemp("run")
    write(folder, Checkpoint(step, 3, tensors, scalars))
    back = found(folder)
    assert (back.step, back.epoch, back.scalars) == (step, 3, scalars)
    assert back.tensors.keys() == tensors.keys()
    for name, array in tensors.items():
        assert back.tensors[name].dtype == array.dtype
        assert back.tensors[name].shape == array.shape
        assert back.tensors[name].tobytes() == array.tobytes()


def test_there_is_none_before_the_first(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    assert latest(tmp_path / "missing") is None


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    for step in (9, 10, 200):
        write(tmp_path, made(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-000000010",
        "checkpoint-000000200",
    ]
    assert found(tmp_path).step == 200


def test_a_step_written_again_is_the_later_one(tmp_path: Path) -> None:
    write(tmp_path, made(5, 1.0))
    write(tmp_path, made(5, 2.0))
    assert found(tmp_path).tensors["model/a"].max() == 2.0


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
@pytest.mark.parametrize("fault", ["cut", "changed", "gone", "swapped"])
def test_one_that_is_not_what_was_written_yields_to_the_one_before(
    tmp_path: Path, name: str, fault: str
) -> None:
    write(tmp_path, made(1, 1.0))
    file = write(tmp_path, made(2, 2.0)) / name
    content = file.read_bytes()
    if fault == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif fault == "changed":
        at = len(content) - 4
        file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    elif fault == "gone":
        file.unlink()
    else:
        shutil.copy(tmp_path / "checkpoint-000000001" / name, file)
    back = found(tmp_path)
    # The state of another step with this one's name is whole only together with its tensors.
    assert (back.step, back.tensors["model/a"].max()) == (1, 1.0)


def test_a_writer_killed_at_any_call_leaves_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(BaseException):
        pass

    calls = itertools.count()

    def dying(at: int, function: Any) -> Any:
        def called(*arguments: Any, **named: Any) -> Any:
            if next(calls) == at:
                raise KilledError
            return function(*arguments, **named)

        return called

    for at in range(40):
        folder = tmp_path / str(at)
        write(folder, made(1, 1.0))
        calls = itertools.count()
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, "save_file", dying(at, save_file))
            patch.setattr(os, "fsync", dying(at, os.fsync))
            for name in ("replace", "rename", "mkdir", "open"):
                patch.setattr(Path, name, dying(at, getattr(Path, name)))
            try:
                write(folder, made(2, 2.0))
            except KilledError:
                died = True
            else:
                died = False
        back = found(folder)
        assert back.tensors["model/a"].max() == back.step
        write(folder, made(3, 3.0))
        assert found(folder).step == 3
        if not died:
            break
    assert at > 5
    assert not died


def test_tensors_alone_are_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "best.safetensors"
    checkpoints.write_tensors(path, {"a": np.zeros(3)})

    def failing(tensors: Any, aside: Path) -> None:
        aside.write_bytes(b"half")
        raise OSError

    monkeypatch.setattr(checkpoints, "save_file", failing)
    with pytest.raises(OSError):
        checkpoints.write_tensors(path, {"a": np.ones(3)})
    assert read_tensors(path)["a"].max() == 0


@given(
    step=st.integers(0, 1000),
    last=st.integers(0, 1000),
    waited_s=st.floats(0, 1000),
    steps=st.integers(1, 500),
    minutes=st.floats(0.01, 10),
)
def test_one_is_due_after_so_many_steps_or_minutes_whichever_is_first(
    step: int, last: int, waited_s: float, steps: int, minutes: float
) -> None:
    config = DistillationConfig(
        teacher="any", texts=("a",), checkpoint_steps=steps, checkpoint_minutes=minutes
    )
    expected = step > last and (step >= last + steps or 50 + waited_s - 50 >= minutes * 60)
    assert due(step, last, 50 + waited_s, 50, config) == expected
