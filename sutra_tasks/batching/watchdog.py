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
"""The descriptor: Celery puts a logger that has none in place of ``sys.stderr``."""


@contextmanager
def watched(timeout_s: float | None) -> Iterator[None]:
    """End the *process*, with all stacks on standard error, if the block takes longer; None: never.

    No thread of Python's could do it: none runs while C code holds the interpreter's lock. The kernel's
    timer can, and a handler written in C: SIGALRM, which nothing else in a device worker uses. One timer
    a process, so one block at a time.
    """
    if timeout_s is None:
        yield
        return
    _dump_and_die()
    # 2 µs; faulthandler's own timer starts a thread each time, for 60 to 200.
    signal.setitimer(signal.ITIMER_REAL, timeout_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@cache
def _dump_and_die() -> None:
    """Have SIGALRM print all stacks, then do what it does by default."""
    faulthandler.register(signal.SIGALRM, file=STDERR, all_threads=True, chain=True)
