"""Ends the process when a call into an engine hangs."""

from __future__ import annotations

import faulthandler
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

__all__ = ["watched"]

STDERR: Final = 2
"""The descriptor: Celery puts a logger that has none in place of ``sys.stderr``."""


@contextmanager
def watched(timeout_s: float | None) -> Iterator[None]:
    """End the *process*, with all stacks on standard error, if the block takes longer; None: never.

    No thread of Python's could do it: none runs while C code holds the interpreter's lock.
    """
    if timeout_s is None:
        yield
        return
    faulthandler.dump_traceback_later(timeout_s, exit=True, file=STDERR)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
