"""Work that several threads request at the same time, done once by the first of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

__all__ = ["SingleFlight"]

Result = TypeVar("Result")


class SingleFlight(Generic[Result]):
    """Runs at most one call for each key at a time; results are not kept after it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[str, Future[Result]] = {}

    def do(self, key: str, work: Callable[[], Result]) -> Result:
        """Return the result of ``work``, or of the call that is already running for this key.

        An exception of ``work`` is raised in all threads that wait for it.
        """
        with self._lock:
            future = self._running.get(key)
            is_first = future is None
            if future is None:
                future = self._running[key] = Future()
        if not is_first:
            return future.result()
        try:
            result = work()
        except BaseException as error:
            self._end(key)
            future.set_exception(error)
            raise
        self._end(key)
        future.set_result(result)
        return result

    def _end(self, key: str) -> None:
        with self._lock:
            del self._running[key]
