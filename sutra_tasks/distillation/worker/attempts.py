"""How often a run was begun: one whose workers die of it, again and again, is given up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sutra_tasks.distillation.data.vector_cache import digest
from sutra_tasks.distillation.names import model_name, runs_folder
from sutra_tasks.errors import ModelError
from sutra_tasks.files import read_json, write_json

if TYPE_CHECKING:
    from sutra_tasks.distillation.config import DistillationConfig
    from sutra_tasks.settings import Settings

__all__ = ["limit_attempts", "limit_preparation"]


@contextmanager
def limit_attempts(path: Path, name: str, at: str, most: int) -> Iterator[None]:
    """Let a block begin that may be the end of its process; an exception that ends it does not count.

    Args:
        path: where it is noted.
        name: of the model that is made.
        at: how far it is; whoever gets any further is counted anew.
        most: times that it may begin at the same place.

    Raises:
        ModelError: it has begun there so often, and its process died of it; it may be asked for again.
    """
    before = read_json(path)
    starts = before["starts"] + 1 if before.get("at") == at else 1
    if starts > most:
        path.unlink(missing_ok=True)
        raise ModelError(
            name,
            f"its distillation ended its worker {starts - 1} times at {at}: out of memory? Lower "
            "batch_size or max_texts, or give the worker more memory; then ask again.",
        )
    write_json(path, {"at": at, "starts": starts})
    try:
        yield
    except Exception:
        path.unlink(missing_ok=True)
        raise
    path.unlink(missing_ok=True)


@contextmanager
def limit_preparation(config: DistillationConfig, options: Settings) -> Iterator[None]:
    """Count a block that comes before a run has its folder: its texts are read, its teacher is named.

    Raises:
        ModelError: as :func:`limit_attempts`.
    """
    runs = runs_folder(options)
    runs.mkdir(parents=True, exist_ok=True)
    path = runs / f"starts-{digest(config.to_json())[:16]}.json"
    with limit_attempts(path, model_name(config), "its texts and its teacher", options.max_attempts):
        yield
