"""Real servers in the forms in which users have them: behind TLS, on a socket, watched by Sentinels."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import redis
import trustme

from sutra_tasks.host.embedded_server import embedded_server, find_binary, free_port, why_not_free
from sutra_tasks.host.processes import spawn, stop
from tests.conftest import wait_until


@dataclass(frozen=True)
class Certificates:
    """Files of an authority, and of the server's and a client's certificate by it."""

    ca: str
    server: str
    client: str
    client_key: str

    @classmethod
    def make(cls, folder: Path, *names: str) -> "Certificates":
        authority = trustme.CA()
        server, client = authority.issue_cert(*names), authority.issue_cert("client.test")
        files = {name: str(folder / f"{name}.pem") for name in ("ca", "server", "client", "client_key")}
        authority.cert_pem.write_to_path(files["ca"])
        server.private_key_and_cert_chain_pem.write_to_path(files["server"])
        client.cert_chain_pems[0].write_to_path(files["client"])
        client.private_key_pem.write_to_path(files["client_key"])
        return cls(**files)


@contextmanager
def tls_front(port: int, certificates: Certificates, *, asks_client: bool = False) -> Iterator[int]:
    """Terminate TLS on a port of its own in front of a plain server, as stunnel does.

    Args:
        port: of the plain server.
        certificates: of the front.
        asks_client: whether a client has to show a certificate.
    """
    front_port = free_port()
    script = str(Path(__file__).with_name("tls_front.py"))
    authority = [certificates.ca] if asks_client else []
    command = [sys.executable, script, str(front_port), str(port), certificates.server, *authority]
    process = spawn(command)
    try:
        wait_until(lambda: why_not_free(front_port))
        yield front_port
    finally:
        stop(process, 5.0)


@dataclass
class Watched:
    """A primary and its replica under Sentinels."""

    sentinel_ports: list[int]
    ports: tuple[int, int]
    running: ExitStack

    @property
    def url(self) -> str:
        hosts = ";".join(f"sentinel://127.0.0.1:{port}" for port in self.sentinel_ports)
        return f"{hosts}/0?master_name=mymaster"

    def primary_port(self) -> int:
        with redis.Redis(port=self.sentinel_ports[0], socket_timeout=5.0) as sentinel:
            found: Any = sentinel.sentinel_get_master_addr_by_name("mymaster")
        return int(found[1])

    def fail_over(self) -> None:
        """Kill the primary, and return once the replica is the primary."""
        before = self.primary_port()
        with redis.Redis(port=before, socket_timeout=5.0) as client:
            pid = client.info("server")["process_id"]
        psutil.Process(pid).kill()
        wait_until(lambda: self.primary_port() != before, within_s=60)


@contextmanager
def watched(folder: Path, *options: str, sentinels: int = 1) -> Iterator[Watched]:
    """Run a primary, a replica and Sentinels that fail over within about two seconds.

    Args:
        folder: for the Sentinels' files.
        *options: of both servers.
        sentinels: how many.
    """
    with ExitStack() as running:
        ports = free_port(), free_port()
        running.enter_context(embedded_server(ports[0], *options))
        replica = ("--replicaof", f"127.0.0.1 {ports[0]}", "--repl-diskless-sync-delay", "0")
        running.enter_context(embedded_server(ports[1], *options, *replica))
        found = Watched([free_port() for _ in range(sentinels)], ports, running)
        for port in found.sentinel_ports:
            config = folder / f"sentinel-{port}.conf"
            config.write_text(
                f"port {port}\nbind 127.0.0.1\ndir {folder}\nlogfile {folder}/sentinel-{port}.log\n"
                f"sentinel monitor mymaster 127.0.0.1 {ports[0]} 1\n"
                "sentinel down-after-milliseconds mymaster 500\n"
                "sentinel failover-timeout mymaster 3000\n"
            )
            process = spawn([find_binary(), str(config), "--sentinel"])
            running.callback(stop, process, 5.0)
        for port in found.sentinel_ports:
            with redis.Redis(port=port, socket_timeout=5.0) as sentinel:
                wait_until(lambda: _knows_replica(sentinel), within_s=30)
        yield found


def _knows_replica(sentinel: redis.Redis) -> bool:
    with suppress(redis.RedisError):
        replicas: Any = sentinel.sentinel_slaves("mymaster")
        return any(one.get("master-link-status") == "ok" for one in replicas)
    return False
