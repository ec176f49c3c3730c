"""Vectors of many texts on disk, in pieces: what was computed before a death is not computed again."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from sutra_tasks.files import read_array, sweep, write_array

if TYPE_CHECKING:
    from sutra_tasks.vectors import Floats

__all__ = ["cached_vectors", "count_shards", "delete_old_runs", "digest"]

SHARD: Final = 2_048
"""Texts whose vectors are computed and written together."""
OLD_S: Final = 30 * 24 * 3600.0
"""Seconds after which nobody goes on with a run."""


def cached_vectors(
    folder: Path,
    texts: Sequence[str],
    compute: Callable[[Sequence[str]], Generator[Floats]],
    *,
    watch: Callable[[Mapping[str, Any]], None],
) -> Floats:
    """Return the vectors of texts, float32 (texts, width); each shard is written when it is there.

    Any number of runs may share a folder at the same time. A shard that is damaged is computed again.

    Args:
        folder: of these texts and of what computes them, and of nothing else.
        texts: one at least.
        compute: gives the vectors of some of them, some rows at a time; closed if ``watch`` raises.
        watch: told whenever there are some; see :class:`~sutra_tasks.distillation.worker.run.Watch`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    rows: list[Floats] = []
    for start in range(0, len(texts), SHARD):
        path, some = folder / f"vectors-{start // SHARD:06d}.npy", texts[start : start + SHARD]
        shard = read_array(path)
        if shard is None or len(shard) != len(some):
            watch({"phase": "teacher", "done": start, "of": len(texts)})
            block: list[Floats] = []
            done = start
            with closing(compute(some)) as found:
                for part in found:
                    block.append(part)
                    done += len(part)
                    watch({"phase": "teacher", "done": done, "of": len(texts)})
            shard = np.concatenate(block).astype(np.float32)
            write_array(path, shard)
        rows.append(shard)
    return np.concatenate(rows)


def count_shards(folder: Path) -> int:
    """Return how many shards are there."""
    return len(list(folder.glob("vectors-*.npy")))


def delete_old_runs(runs: Path, now: float, *, but: Collection[Path]) -> None:
    """Delete what nobody goes on with: folders that nothing was written to for a month.

    Args:
        runs: the folder of all runs.
        now: seconds since 1970.
        but: those that stay.
    """
    sweep(runs)
    for path in runs.iterdir():
        with suppress(FileNotFoundError):  # another run has just ended
            if path not in but and path.is_dir() and now - path.stat().st_mtime > OLD_S:
                shutil.rmtree(path, ignore_errors=True)


def digest(value: Any) -> str:
    """Return the sha256 of a JSON value, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
