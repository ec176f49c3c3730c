"""Vectors on disk, in pieces: what is there is not computed again, whatever ended the one before."""

import os
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sutra_tasks.distillation.data.vector_cache import (
    SHARD,
    cached_vectors,
    count_shards,
    delete_old_runs,
)
from sutra_tasks.files import ABANDONED_S, TEMPORARY
from sutra_tasks.vectors import Floats

TEXTS = [str(number) for number in range(2 * SHARD + 10)]


class StoppedError(Exception):
    pass


class Engine:
    """Gives a text's number, some rows at a time; notes what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.closed = 0

    def __call__(self, texts: Sequence[str]) -> Generator[Floats]:
        self.asked.append(len(texts))
        try:
            for start in range(0, len(texts), 100):
                yield np.array([[float(text), 1.0] for text in texts[start : start + 100]], np.float64)
        except GeneratorExit:
            self.closed += 1
            raise


def silent(_: Mapping[str, Any]) -> None:
    pass


def test_vectors_stand_in_the_order_of_texts_and_are_computed_once(tmp_path: Path) -> None:
    engine, told = Engine(), list[Mapping[str, Any]]()
    first = cached_vectors(tmp_path / "run", TEXTS, engine, report=told.append)
    assert first.dtype == np.float32
    assert first.shape == (len(TEXTS), 2)
    assert np.array_equal(first[:, 0], np.arange(len(TEXTS)))
    assert engine.asked == [SHARD, SHARD, 10]
    assert [one["done"] for one in told] == sorted(one["done"] for one in told)
    assert told[-1] == {"phase": "teacher", "done": len(TEXTS), "of": len(TEXTS)}
    assert np.array_equal(cached_vectors(tmp_path / "run", TEXTS, engine, report=silent), first)
    assert len(engine.asked) == 3


def test_what_is_stopped_within_a_shard_leaves_the_ones_before_and_closes_its_source(
    tmp_path: Path,
) -> None:
    engine = Engine()

    def stop(progress: Mapping[str, Any]) -> None:
        if progress["done"] > SHARD + 300:
            raise StoppedError

    with pytest.raises(StoppedError):
        cached_vectors(tmp_path / "run", TEXTS, engine, report=stop)
    assert (engine.closed, count_shards(tmp_path / "run")) == (1, 1)
    again = Engine()
    found = cached_vectors(tmp_path / "run", TEXTS, again, report=silent)
    assert np.array_equal(found[:, 0], np.arange(len(TEXTS)))
    assert again.asked == [SHARD, 10]


def test_what_a_writer_left_half_done_is_never_read_and_goes_in_time(tmp_path: Path) -> None:
    for name, age_s in (("old", 2 * ABANDONED_S), ("young", 0)):
        path = tmp_path / f".vectors-000000.npy.{name}{TEMPORARY}"
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age_s, time.time() - age_s))
    assert cached_vectors(tmp_path, TEXTS[:5], Engine(), report=silent).shape == (5, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f".vectors-000000.npy.young{TEMPORARY}", "vectors-000000.npy",
    ]  # fmt: skip


@pytest.mark.parametrize("damage", [b"", b"half", None])
def test_a_damaged_shard_is_computed_again(damage: bytes | None, tmp_path: Path) -> None:
    first = cached_vectors(tmp_path, TEXTS, Engine(), report=silent)
    path = tmp_path / "vectors-000001.npy"
    path.write_bytes(path.read_bytes()[:-8] if damage is None else damage)
    engine = Engine()
    assert np.array_equal(cached_vectors(tmp_path, TEXTS, engine, report=silent), first)
    assert engine.asked == [SHARD]


def test_two_runs_with_the_same_texts_share_a_folder(tmp_path: Path) -> None:
    inner = Engine()

    class Interrupted(Engine):
        """Another run does the same shard while this one does."""

        def __call__(self, texts: Sequence[str]) -> Generator[Floats]:
            yield from super().__call__(texts)
            cached_vectors(tmp_path, TEXTS, inner, report=silent)

    outer = Interrupted()
    found = cached_vectors(tmp_path, TEXTS, outer, report=silent)
    assert np.array_equal(found[:, 0], np.arange(len(TEXTS)))
    assert (outer.asked, inner.asked) == ([SHARD], [SHARD, SHARD, 10])


def test_folders_that_nobody_wrote_to_for_a_month_go(tmp_path: Path) -> None:
    for name in ("old", "mine"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").write_text("")
    now, month_s = (tmp_path / "old").stat().st_mtime, 30 * 24 * 3600.0
    delete_old_runs(tmp_path, now + month_s - 10, keep=())
    assert (tmp_path / "old").exists()
    delete_old_runs(tmp_path, now + month_s + 10, keep=[tmp_path / "mine"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "mine"]
