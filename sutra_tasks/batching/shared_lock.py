"""Many at once, or one alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Floor"]


class Floor:
    """A lock that many threads share, unless one wants to be alone: it goes before who comes later."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._sharing = self._wanting = 0
        self._taken = False

    def join(self) -> None:
        """Come onto the floor with others; whoever does must :meth:`leave`, on any thread."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._taken or self._wanting))
            self._sharing += 1

    def leave(self) -> None:
        """Leave the floor to others."""
        with self._changed:
            self._sharing -= 1
            if self._wanting and not self._sharing:
                self._changed.notify_all()

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Be on the floor with others."""
        self.join()
        try:
            yield
        finally:
            self.leave()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Be on the floor alone."""
        with self._changed:
            self._wanting += 1
            try:
                self._changed.wait_for(lambda: not (self._taken or self._sharing))
                self._taken = True
            finally:
                self._wanting -= 1
        try:
            yield
        finally:
            with self._changed:
                self._taken = False
                self._changed.notify_all()
