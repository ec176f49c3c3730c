"""The texts that one run drew from the sample of real traffic, kept on disk until the run ends."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from sutra_tasks.files import write_whole

__all__ = ["RunSample"]

PREFIX: Final = "sample-"
OWNER_ONLY: Final = 0o600


class RunSample:
    """A run's draw: the same texts each time the run is delivered.

    With other texts it would be another run, which could not continue from its checkpoints.
    """

    def __init__(
        self, runs: Path, task_id: str, retention_s: float, *, clock: Callable[[], float] = time.time
    ) -> None:
        """Name the file; reads and writes nothing.

        Args:
            runs: the folder of all runs.
            task_id: of this run.
            retention_s: age at which the draws of other runs, which never ended, are deleted.
            clock: gives seconds since 1970.
        """
        # Hashed, because callers choose task ids: none of them may name a file.
        self._path = runs / f"{PREFIX}{hashlib.sha256(task_id.encode()).hexdigest()[:32]}.json"
        self._retention_s, self._clock = retention_s, clock

    def texts(self, draw: Callable[[], list[str]]) -> list[str]:
        """Return the run's texts; the first time from ``draw``. Only this user can read the file."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._delete_abandoned()
        try:
            found: list[str] = json.loads(self._path.read_text("utf-8"))
        except FileNotFoundError:
            found = draw()
            write_whole(self._path, json.dumps(found).encode(), mode=OWNER_ONLY)
        return found

    def delete(self) -> None:
        """Delete the texts, because the run has ended."""
        self._path.unlink(missing_ok=True)

    def _delete_abandoned(self) -> None:
        for path in [*self._path.parent.glob(f"{PREFIX}*"), *self._path.parent.glob(f".{PREFIX}*")]:
            with suppress(FileNotFoundError):  # another run has just ended
                if path != self._path and self._clock() - path.stat().st_mtime > self._retention_s:
                    path.unlink()
