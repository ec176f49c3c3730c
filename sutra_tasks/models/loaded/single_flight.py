"""Slow work that several threads request at the same time: done once, on a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

__all__ = ["SingleFlight", "StillRunning"]

Result = TypeVar("Result")


class StillRunning(Exception):  # noqa: N818 - the work goes on, and may yet succeed
    """Work has not ended in time; ``seconds`` have passed since it began."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds


@dataclass(slots=True, eq=False)
class _Flight(Generic[Result]):
    began_at: float
    future: Future[Result] = field(default_factory=Future)


class SingleFlight(Generic[Result]):
    """Runs at most one call for each key at a time; results are not kept after it.

    A call that hangs, for example on storage, keeps its own thread only.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Run nothing yet; ``clock`` gives seconds that only grow."""
        self._clock = clock
        self._lock = threading.Lock()
        self._running: dict[str, _Flight[Result]] = {}

    def do(self, key: str, work: Callable[[], Result], patience_s: float | None = None) -> Result:
        """Return the result of ``work``, or of the call that is already running for this key.

        An exception of ``work`` is raised in all threads that wait for it.

        Args:
            key: of the call.
            work: what it does.
            patience_s: seconds after its beginning until which this thread waits for it; None: for ever.

        Raises:
            StillRunning: it did not end in time; it goes on, and later calls for the key find its end.
        """
        with self._lock:
            flight = self._running.get(key)
            if flight is None:
                flight = self._running[key] = _Flight(self._clock())
                name = f"load {key}"[:60]
                # A daemon: what hangs must not keep the process from ending.
                threading.Thread(
                    target=self._run, args=(key, flight, work), name=name, daemon=True
                ).start()
        left_s = None
        if patience_s is not None:
            left_s = max(0.0, patience_s - (self._clock() - flight.began_at))
        try:
            return flight.future.result(left_s)
        except TimeoutError:
            if flight.future.done():  # an error of the work itself
                return flight.future.result()
            raise StillRunning(self._clock() - flight.began_at) from None

    def running(self) -> dict[str, float]:
        """Return the keys of the calls that run, each with the seconds since it began."""
        now = self._clock()
        with self._lock:
            return {key: now - flight.began_at for key, flight in self._running.items()}

    def _run(self, key: str, flight: _Flight[Result], work: Callable[[], Result]) -> None:
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 - raised in the threads that wait
            self._end(key)
            flight.future.set_exception(error)
        else:
            self._end(key)
            flight.future.set_result(result)

    def _end(self, key: str) -> None:
        with self._lock:
            del self._running[key]
