"""Ends the process when a call into an engine hangs."""

from __future__ import annotations

import faulthandler
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Final

__all__ = ["watched"]

STDERR: Final = 2
"""The file descriptor itself, because Celery replaces ``sys.stderr`` by a logger without one."""


@contextmanager
def watched(timeout_s: float | None) -> Iterator[None]:
    """End the *process*, with all stacks on standard error, if the block takes longer.

    A thread of Python cannot do it, because none runs while C code holds the interpreter's lock. The
    kernel's timer can: it sends SIGALRM, which nothing else in a device worker uses, to a handler
    written in C. A process has one timer, so one block is watched at a time.

    Args:
        timeout_s: seconds that the block may take; None: forever.
    """
    if timeout_s is None:
        yield
        return
    _handle_alarm()
    # It takes 2 µs; faulthandler's own timer starts a thread each time, which takes 60 to 200.
    signal.setitimer(signal.ITIMER_REAL, timeout_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@cache
def _handle_alarm() -> None:
    """Have SIGALRM print all stacks, and then end the process, as it does by default."""
    faulthandler.register(signal.SIGALRM, file=STDERR, all_threads=True, chain=True)
