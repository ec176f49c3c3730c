"""Child processes that end with their parent, however it ends."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Final

__all__ = ["spawn", "stop", "uninterrupted"]

_PR_SET_PDEATHSIG: Final = 1
# Loaded before any fork: a child between fork and exec must not import.
_LIBC: Final = ctypes.CDLL(None) if sys.platform == "linux" else None
_END_SIGNALS: Final = {signal.SIGINT, signal.SIGTERM}


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back SIGINT and SIGTERM during a block, so that no child starts without being noted."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _END_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def spawn(
    command: Sequence[str],
    *,
    environ: Mapping[str, str] | None = None,
    output: IO[bytes] | int | None = None,
) -> subprocess.Popen[bytes]:
    """Start ``command`` in a new session.

    Ctrl-C in the terminal then reaches only the parent, which stops its children in order. On Linux the
    kernel sends the child SIGTERM when the parent dies, also by SIGKILL.
    """
    parent = os.getpid()

    def before_exec() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _END_SIGNALS)  # a child inherits the mask
        if _LIBC is not None:
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:  # it died before the line above
                os._exit(1)

    return subprocess.Popen(  # noqa: S603 - commands are this package's own
        command,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        start_new_session=True,
        preexec_fn=before_exec,  # noqa: PLW1509 - callers start children before any thread
    )


def stop(process: subprocess.Popen[bytes], timeout_s: float) -> int:
    """Send SIGTERM to a child, SIGKILL after ``timeout_s``, and return its exit status."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
    return process.wait()
