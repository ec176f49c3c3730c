"""A server that keeps its port and its data over restarts."""

from contextlib import ExitStack
from pathlib import Path

import psutil
import redis

from sutra_tasks.host.embedded_server import embedded_server, free_port


class DurableServer:
    """A server with an append-only file in ``folder``; it can stop and start again."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.address = f"redis://127.0.0.1:{self.port}/0"
        # The server writes before it answers, so its data outlive the process, though not the machine.
        self._options = ["--appendonly", "yes", "--appendfsync", "no", "--dir", str(folder)]
        self._running = ExitStack()

    def start(self) -> None:
        self._running.enter_context(embedded_server(self.port, *self._options))

    def stop(self) -> None:
        self._running.close()

    def kill(self, client: redis.Redis) -> None:
        psutil.Process(client.info("server")["process_id"]).kill()
        self.stop()
