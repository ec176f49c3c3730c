"""Ends the process when a call into an engine hangs."""

from __future__ import annotations

import ctypes
import faulthandler
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Final

__all__ = ["HUNG", "watched"]

HUNG: Final = 14
"""Exit status of a process whose block took too long: the number of SIGALRM."""

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
    """Have SIGALRM print all stacks, and then end the process with its number, 14, as exit status.

    Its default action would do nothing in process 1 of a container, which the kernel protects. C's
    ``_exit`` takes one number, as a signal handler does, and may be called in one: faulthandler calls
    the handler that it finds once the stacks are printed.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(signal.SIGALRM, ctypes.cast(libc._exit, ctypes.c_void_p))  # noqa: SLF001 - C's name
    faulthandler.register(signal.SIGALRM, file=STDERR, all_threads=True, chain=True)
