"""Work that several threads want at once, done by one of them for all."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

__all__ = ["SingleFlight"]

Made = TypeVar("Made")


class SingleFlight(Generic[Made]):
    """See the module's docstring; what was done is not kept."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way: dict[str, Future[Made]] = {}

    def do(self, key: str, work: Callable[[], Made]) -> Made:
        """Return what ``work`` gives, or what it gives to the thread that does it for this key just now.

        Whatever it raises is raised to all who wait.
        """
        with self._lock:
            future = self._under_way.get(key)
            mine = future is None
            if future is None:
                future = self._under_way[key] = Future()
        if not mine:
            return future.result()
        try:
            made = work()
        except BaseException as error:
            self._end(key)
            future.set_exception(error)
            raise
        self._end(key)
        future.set_result(made)
        return made

    def _end(self, key: str) -> None:
        with self._lock:
            del self._under_way[key]
