"""How many calls of a device may wait for models, so that the others find a thread.

A call that waits for a model keeps one of the device's threads. A quarter of them may wait for one
model, and three quarters for all: storage that hangs holds up no call for a model in memory.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Crowded", "WaitingPlaces"]


class Crowded(Exception):  # noqa: N818 - not an error: the call is tried again
    """As many calls as may wait for this model, or for all, wait already."""


class WaitingPlaces:
    """The places of one device; safe to use from many threads."""

    def __init__(self, threads: int) -> None:
        """Begin with nobody waiting on any of a device's ``threads``."""
        self._for_one = max(1, threads // 4)
        self._for_all = max(1, min(3 * self._for_one, threads - 1))
        self._lock = threading.Lock()
        self._waiting: Counter[str] = Counter()

    def waiting_for(self, model: str) -> int:
        """Return how many calls wait for a model."""
        with self._lock:
            return self._waiting[model]

    @contextmanager
    def place(self, model: str) -> Iterator[None]:
        """Wait for a model inside the block.

        Raises:
            Crowded: no place is free.
        """
        with self._lock:
            if self._waiting[model] >= self._for_one or self._waiting.total() >= self._for_all:
                raise Crowded
            self._waiting[model] += 1
        try:
            yield
        finally:
            with self._lock:
                self._waiting[model] -= 1
                if not self._waiting[model]:
                    del self._waiting[model]
