"""Counts how often a run began at the same place, and gives it up if it keeps ending its worker."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sutra_tasks.distillation.names import fingerprint, model_name, runs_folder
from sutra_tasks.errors import ModelError
from sutra_tasks.files import read_json, write_json

if TYPE_CHECKING:
    from sutra_tasks.distillation.config import DistillationConfig
    from sutra_tasks.settings import Settings

__all__ = ["limit_attempts", "limit_preparation"]


@contextmanager
def limit_attempts(path: Path, name: str, progress: str, max_attempts: int) -> Iterator[None]:
    """Run a block that may end its process; an exception that the process survives does not count.

    Args:
        path: the file that stores the count.
        name: of the model that the run makes, for the error.
        progress: how far the run is; at another place the count starts again.
        max_attempts: how often the block may begin at the same place.

    Raises:
        ModelError: the block ended its process ``max_attempts`` times; the next call counts from 0.
    """
    before = read_json(path)
    attempts = before["attempts"] + 1 if before.get("progress") == progress else 1
    if attempts > max_attempts:
        path.unlink(missing_ok=True)
        raise ModelError(
            name,
            f"its distillation ended its worker {attempts - 1} times at {progress}: out of memory? "
            "Lower batch_size or max_texts, or give the worker more memory; then ask again.",
        )
    write_json(path, {"progress": progress, "attempts": attempts})
    try:
        yield
    except Exception:
        path.unlink(missing_ok=True)
        raise
    path.unlink(missing_ok=True)


@contextmanager
def limit_preparation(config: DistillationConfig, options: Settings) -> Iterator[None]:
    """Limit the attempts of what precedes a run's folder: reading its texts and its teacher's name.

    Raises:
        ModelError: as :func:`limit_attempts`.
    """
    runs = runs_folder(options)
    runs.mkdir(parents=True, exist_ok=True)
    path = runs / f"attempts-{fingerprint(config.to_json())[:16]}.json"
    with limit_attempts(path, model_name(config), "its texts and its teacher", options.max_attempts):
        yield
