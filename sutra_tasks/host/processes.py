"""Child processes that end with their parent, however it ends."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any, Final

__all__ = ["END_SIGNALS", "end_on_signals", "reap_orphans", "spawn", "stop", "uninterrupted"]

SHELL_STATUS: Final = 128
"""A shell reports this, and the signal's number, for a process that a signal ended."""

_PR_SET_PDEATHSIG: Final = 1
# Loaded before any fork: a child between fork and exec must not import.
_LIBC: Final = ctypes.CDLL(None) if sys.platform == "linux" else None
END_SIGNALS: Final = tuple(one for one in signal.Signals if one.name in {"SIGINT", "SIGTERM", "SIGHUP"})
"""What asks a process to end: Ctrl-C, a service manager, a terminal that closes."""


def end_on_signals() -> None:
    """Have SIGTERM and SIGHUP end this process in order, by :class:`SystemExit`, as SIGINT does.

    Their default action leaves temporary files behind, and in process 1 of a container it does nothing.
    A signal that this process was started to ignore stays ignored, as ``nohup`` wants it.
    """

    def end(signum: int, frame: Any) -> None:  # noqa: ARG001 - a signal handler's shape
        raise SystemExit(SHELL_STATUS + signum)

    for one in END_SIGNALS:
        if signal.getsignal(one) is signal.SIG_DFL:
            signal.signal(one, end)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back signals that end this process during a block, so that no child is left unnoted."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, END_SIGNALS)
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
        signal.pthread_sigmask(signal.SIG_UNBLOCK, END_SIGNALS)  # a child inherits the mask
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


def reap_orphans(own: Collection[int]) -> None:
    """Collect ended processes that became children of this one because it is process 1.

    Without an init in the container nobody else does, and each would stay as a zombie.

    Args:
        own: children that this process started, whose status somebody waits for.
    """
    while os.getpid() == 1:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if ended is None or ended.si_pid in own:
            return
        os.waitpid(ended.si_pid, os.WNOHANG)
