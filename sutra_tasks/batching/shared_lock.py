"""A readers-writer lock that prefers the writer: jobs share it, a suspect takes it alone.

A lock around the tasks and not a flag of the batcher's jobs, because texts are tokenized on the tasks'
own threads, and a text may end the process there as well.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["SharedLock"]


class SharedLock:
    """Held by many threads at once, or by one exclusively; a waiting exclusive holder goes first."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._sharing = self._waiting = 0
        self._taken = False

    def acquire_shared(self) -> None:
        """Wait until nobody has or wants the lock exclusively, and share it."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._taken or self._waiting))
            self._sharing += 1

    def release_shared(self) -> None:
        """End one :meth:`acquire_shared`, which may have been another thread's."""
        with self._changed:
            self._sharing -= 1
            if self._waiting and not self._sharing:
                self._changed.notify_all()

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Share the lock inside the block."""
        self.acquire_shared()
        try:
            yield
        finally:
            self.release_shared()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Be the only one with the lock inside the block."""
        with self._changed:
            self._waiting += 1
            try:
                self._changed.wait_for(lambda: not (self._taken or self._sharing))
                self._taken = True
            finally:
                self._waiting -= 1
        try:
            yield
        finally:
            with self._changed:
                self._taken = False
                self._changed.notify_all()
