"""The sample of real traffic that a deployment keeps, if it wants one, and what a run drew of it."""

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
ONLY_MINE: Final = 0o600


class RunSample:
    """What one run drew of the sample: the same texts each time it is delivered, until it has ended.

    With others it would be another run, which begins anew.
    """

    def __init__(
        self, runs: Path, task_id: str, retention_s: float, *, clock: Callable[[], float] = time.time
    ) -> None:
        """Prepare.

        Args:
            runs: the folder of all runs.
            task_id: of this one.
            retention_s: seconds after which what other runs left there, and never came back to, goes.
            clock: seconds since 1970.
        """
        # Callers choose ids of tasks: none is to name a file.
        self._path = runs / f"{PREFIX}{hashlib.sha256(task_id.encode()).hexdigest()[:32]}.json"
        self._retention_s, self._clock = retention_s, clock

    def texts(self, draw: Callable[[], list[str]]) -> list[str]:
        """Return the run's texts: from ``draw`` the first time; nobody else may read where they are."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._drop_abandoned()
        try:
            found: list[str] = json.loads(self._path.read_text("utf-8"))
        except FileNotFoundError:
            found = draw()
            write_whole(self._path, json.dumps(found).encode(), mode=ONLY_MINE)
        return found

    def drop(self) -> None:
        """Delete them: the run has ended."""
        self._path.unlink(missing_ok=True)

    def _drop_abandoned(self) -> None:
        for path in [*self._path.parent.glob(f"{PREFIX}*"), *self._path.parent.glob(f".{PREFIX}*")]:
            with suppress(FileNotFoundError):  # another run has just ended
                if path != self._path and self._clock() - path.stat().st_mtime > self._retention_s:
                    path.unlink()
