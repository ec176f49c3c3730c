"""What is wrong with single streams: each is left alone for a while, and no other one waits for it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import redis

from sutra_tasks.server_errors import is_permanent, server_words
from sutra_tasks.streaming.consumer.pacing import growing_pause_s

__all__ = ["StreamFaults", "concerns_one_stream"]

logger = logging.getLogger(__name__)

FIRST_PAUSE_S: Final = 0.5
MOST_PAUSE_S: Final = 10.0
"""Seconds after which a stream is looked at again, however often it failed."""
FORGET_S: Final = 30.0
"""Seconds after which a fault is forgotten that did not come again: other devices did the work."""


@dataclass(frozen=True, slots=True)
class _Fault:
    """Why something could not be done with a stream, how often in a row, and when it is tried again."""

    reason: str
    failures: int
    again_at: float


class StreamFaults:
    """The faults of all streams, by the activity that failed, such as ``read``; for any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: dict[tuple[str, str], _Fault] = {}

    def is_due(self, stream: str, *activities: str, now: float) -> bool:
        """Whether none of ``activities`` failed so recently that the stream is to be left alone."""
        with self._lock:
            faults = [self._faults.get((stream, one)) for one in activities]
        return all(fault is None or now >= fault.again_at for fault in faults)

    @contextmanager
    def guard(self, stream: str, activity: str, now: float) -> Iterator[None]:
        """Note an error of the block that concerns this stream alone; pass on any other.

        Raises:
            redis.RedisError: the server is in a state that concerns every stream.
        """
        try:
            yield
        except Exception as error:
            if not concerns_one_stream(error):
                raise
            self.note(stream, activity, server_words(error), now)
        else:
            self.clear(stream, activity)

    def note(self, stream: str, activity: str, reason: str, now: float) -> None:
        """Have a stream left alone for a while that grows with each failure in a row."""
        with self._lock:
            before = self._faults.get((stream, activity))
            failures = before.failures + 1 if before else 1
            pause_s = growing_pause_s(failures, FIRST_PAUSE_S, MOST_PAUSE_S)
            self._faults[stream, activity] = _Fault(reason, failures, now + pause_s)
        if before is None or before.reason != reason:
            logger.error("stream %s: %s failed and is tried again later: %s", stream, activity, reason)

    def clear(self, stream: str, activity: str) -> None:
        """Forget a fault: it is over."""
        if not self._faults:  # nearly always
            return
        with self._lock:
            if self._faults.pop((stream, activity), None) is not None:
                logger.warning("stream %s: %s goes on", stream, activity)

    def keep_only(self, streams: Collection[str]) -> None:
        """Forget the faults of streams that were deleted."""
        with self._lock:
            for stream, activity in list(self._faults):
                if stream not in streams:
                    del self._faults[stream, activity]

    def reasons(self, now: float) -> Mapping[str, list[str]]:
        """Return what is wrong with each stream that has a fault."""
        found: dict[str, list[str]] = {}
        with self._lock:
            for (stream, activity), fault in list(self._faults.items()):
                if now > fault.again_at + FORGET_S:
                    del self._faults[stream, activity]
                    continue
                found.setdefault(stream, []).append(f"{activity}: {fault.reason}")
        return found


def concerns_one_stream(error: Exception) -> bool:
    """Whether an error came of the keys or entries of one stream, and not of the server as a whole."""
    return is_permanent(error) and not isinstance(error, redis.ConnectionError)
