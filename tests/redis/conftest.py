"""One server for the tier; each test starts on an empty database and must leave one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import redis

from sutra_tasks.broker.in_flight import InFlightMessages, in_flight_of
from sutra_tasks.broker.queues import new_incarnation
from sutra_tasks.host.embedded_server import embedded_server
from tests.redis.peers import Receiver, send

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

KOMBU_BINDINGS = "_kombu.binding"
"""kombu remembers in keys of this prefix, for ever, which queues an exchange has."""


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    with embedded_server() as address:
        yield address


@pytest.fixture
def client(url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(url, socket_timeout=10.0) as connected:
        yield connected


@pytest.fixture
def leaves() -> set[str]:
    """Names of the keys without a TTL that the test leaves behind: it must add every one."""
    return set()


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(client: redis.Redis, leaves: set[str]) -> Iterator[None]:
    client.flushdb()
    client.script_flush()  # so that no test leans on a script that another one left
    yield
    names = [name.decode() for name in client.scan_iter()]
    left = {name for name in names if client.ttl(name) == -1}
    assert {name for name in left if not name.startswith(KOMBU_BINDINGS)} == leaves


@pytest.fixture
def in_flight() -> InFlightMessages:
    return in_flight_of(new_incarnation("t"))


@pytest.fixture
def put(url: str) -> Callable[..., list[bytes]]:
    """``put(queue, *bodies, **options)``: a stock client sends; what is stored comes back."""
    return partial(send, url)


@pytest.fixture
def open_receiver(url: str) -> Iterator[Callable[..., Receiver]]:
    """``open_receiver(*queues, in_flight=...)``: a consumer, closed when the test ends."""
    with ExitStack() as opened:

        def open_one(*queues: Any, **options: Any) -> Receiver:
            receiver = Receiver(url, *queues, **options)
            opened.callback(receiver.close)
            return receiver

        yield open_one


@pytest.fixture
def start(url: str) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start one end of a result in a process of its own: an app reads its settings once."""
    # Celery's backend calls a method that redis-py 8 calls deprecated.
    warnings = ["-Werror", "-Wignore:Call to deprecated setex:DeprecationWarning"]
    command = [sys.executable, *warnings, "-m", "tests.redis.results"]
    started: list[subprocess.Popen[bytes]] = []

    def start_one(*arguments: str, **variables: str) -> subprocess.Popen[bytes]:
        environ = {**os.environ, "SUTRA_BROKER_URL": url, **variables}
        one = subprocess.Popen(
            [*command, *arguments],
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        started.append(one)
        return one

    yield start_one
    for one in started:
        one.kill()
        one.communicate()


@pytest.fixture
def process(start: Callable[..., subprocess.Popen[bytes]]) -> Callable[..., str]:
    """Run one end of a result to its end and return what it printed."""

    def run(*arguments: str, **variables: str) -> str:
        one = start(*arguments, **variables)
        answer, said = one.communicate(timeout=60)
        assert one.returncode == 0, said.decode()
        return answer.decode()

    return run


@pytest.fixture
def get(process: Callable[..., str]) -> Callable[..., dict[str, Any]]:
    """``get(*ids)``: what a caller gets or catches for each task, described."""
    return lambda *names: json.loads(process("get", *names))
