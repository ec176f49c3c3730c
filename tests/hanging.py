"""Storage that hangs, made of a file that the kernel lets nobody open."""

import fcntl
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

needs_leases = pytest.mark.skipif(sys.platform != "linux", reason="leases of files are Linux's")


@contextmanager
def hanging(file: Path) -> Iterator[None]:
    """Have every attempt to open a file wait inside the kernel until the block ends, or for 45 seconds.

    So does a mount whose server is gone. The block holds a lease on the file, as a file server would.
    """
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)  # the kernel asks for the lease with it
    mode = file.stat().st_mode
    file.chmod(0o644)
    descriptor = os.open(file, os.O_RDWR)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        yield
    finally:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        os.close(descriptor)
        file.chmod(mode)
        signal.signal(signal.SIGIO, before)
