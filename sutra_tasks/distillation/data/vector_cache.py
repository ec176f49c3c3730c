"""The teacher's vectors on disk, in shards, so that a run computes each shard only once."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from sutra_tasks.files import read_array, sweep, write_array

if TYPE_CHECKING:
    from sutra_tasks.vectors import Floats

__all__ = ["cached_vectors", "count_shards", "delete_old_runs"]

SHARD: Final = 2_048
"""Texts whose vectors are computed and written together."""
OLD_S: Final = 30 * 24 * 3600.0
"""Seconds without a write after which a run's folder is deleted."""


def cached_vectors(
    folder: Path,
    texts: Sequence[str],
    compute: Callable[[Sequence[str]], Generator[Floats]],
    *,
    report: Callable[[Mapping[str, Any]], None],
) -> Floats:
    """Return the vectors of texts: float32, shape (texts, width); each shard is written when complete.

    Any number of runs may use a folder at the same time. A damaged shard is computed again.

    Args:
        folder: only for these texts and this teacher.
        texts: one at least.
        compute: yields the vectors of some texts, some rows at a time; closed if ``report`` raises.
        report: called with the progress; see :class:`~sutra_tasks.distillation.worker.run.Report`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    rows: list[Floats] = []
    for start in range(0, len(texts), SHARD):
        path, some = folder / f"vectors-{start // SHARD:06d}.npy", texts[start : start + SHARD]
        shard = read_array(path)
        if shard is None or len(shard) != len(some):
            report({"phase": "teacher", "done": start, "of": len(texts)})
            block: list[Floats] = []
            done = start
            with closing(compute(some)) as found:
                for part in found:
                    block.append(part)
                    done += len(part)
                    report({"phase": "teacher", "done": done, "of": len(texts)})
            shard = np.concatenate(block).astype(np.float32)
            write_array(path, shard)
        rows.append(shard)
    return np.concatenate(rows)


def count_shards(folder: Path) -> int:
    """Return how many shards a folder has."""
    return len(list(folder.glob("vectors-*.npy")))


def delete_old_runs(runs: Path, now: float, *, keep: Collection[Path]) -> None:
    """Delete the folders of abandoned runs: those that nothing was written to for a month.

    Args:
        runs: the folder of all runs.
        now: seconds since 1970.
        keep: folders that stay.
    """
    sweep(runs)
    for path in runs.iterdir():
        with suppress(FileNotFoundError):  # another run has just deleted it
            if path not in keep and path.is_dir() and now - path.stat().st_mtime > OLD_S:
                shutil.rmtree(path, ignore_errors=True)
