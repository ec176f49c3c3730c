"""An outage of the results server ends no wait, and does not disturb results that are dropped."""

import gc
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import celery
import numpy as np
import pytest
import redis
from celery import states
from celery.backends.redis import RedisBackend
from celery.result import GroupResult

from sutra_tasks import ServerUnavailableError, Vectors
from sutra_tasks.app import app
from sutra_tasks.client.results import EmbedResult, ResultBackend
from sutra_tasks.host.embedded_server import embedded_server, free_port
from tests.conftest import disconnect, wait_until

pytestmark = pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning")

VECTORS = Vectors.of(np.arange(6, dtype=np.float32).reshape(2, 3))

Start = Callable[..., AbstractContextManager[str]]
Wait = Callable[..., Future[Any]]
BackendAt = Callable[[str], ResultBackend]
ResultAt = Callable[..., EmbedResult]


@pytest.fixture
def start(tmp_path) -> Start:
    """Run servers one after the other on the same data."""

    @contextmanager
    def durable(port: int | None = None) -> Iterator[str]:
        options = ("--appendonly", "yes", "--appendfsync", "always", "--dir", str(tmp_path))
        with embedded_server(port, *options) as address:
            yield address

    return durable


@pytest.fixture
def backend_at() -> Iterator[BackendAt]:
    """Make backends whose connections are closed when the test ends."""
    with ExitStack() as opened:

        def open_one(address: str) -> ResultBackend:
            backend = ResultBackend(app=app, url=address)
            opened.callback(disconnect, backend)
            return backend

        yield open_one


@pytest.fixture
def result_at(backend_at: BackendAt) -> ResultAt:
    """Make results, each with a backend of its own."""

    def result(address: str, task_id: str = "task", **options: Any) -> EmbedResult:
        return EmbedResult(task_id, backend=backend_at(address), app=app, **options)

    return result


@pytest.fixture
def wait(backend_at: BackendAt) -> Iterator[Wait]:
    """Call ``wait(results.get, ...)`` in a thread, which ends before its backend is closed."""
    with ThreadPoolExecutor(max_workers=8) as threads:
        yield threads.submit


def store(address: str, task_id: str = "task", value: Any = VECTORS, state=states.SUCCESS) -> None:
    """Store a result as stock Celery does."""
    backend = RedisBackend(app=app, url=address)
    backend.store_result(task_id, value, state)
    disconnect(backend)


def listening(address: str) -> bool:
    with redis.Redis.from_url(address) as client:
        return bool(client.pubsub_channels())


def is_that(got: Any) -> bool:
    return np.array_equal(got, VECTORS)


def test_letting_go_of_a_result_of_a_stopped_server_is_silent_and_quick(start, backend_at, monkeypatch):
    raised: list[Any] = []
    gc.collect()
    gc.freeze()  # what other tests left would take a second of its own to look through
    monkeypatch.setattr(sys, "unraisablehook", raised.append)
    with start() as address:
        backend = backend_at(address)
        results = [EmbedResult(name, backend=backend, app=app) for name in "abc"]
        for result in results:
            backend.add_pending_result(result, weak=True)
        wait_until(lambda: listening(address))
    began = time.monotonic()
    del result, results
    gc.collect()
    took_s = time.monotonic() - began
    gc.unfreeze()
    assert took_s < 1
    assert raised == []
    assert not backend.result_consumer.subscribed_to


def test_a_result_let_go_is_no_longer_listened_for(start, result_at):
    with start() as address:
        result = result_at(address)
        result.backend.add_pending_result(result, weak=True)
        backend = result.backend
        wait_until(lambda: listening(address))
        del result
        wait_until(lambda: not listening(address))
        assert not backend.result_consumer.subscribed_to


def test_a_result_stored_while_nobody_listened_is_found_after_the_outage(start, result_at, wait):
    port = free_port()
    with start(port) as address:
        waiting = wait(result_at(address).get, timeout=60)
        wait_until(lambda: listening(address))
    with start() as elsewhere:
        store(elsewhere)
    assert not waiting.done()
    with start(port):
        assert is_that(waiting.result(timeout=30))


def test_a_result_stored_after_the_outage_is_heard(start, result_at, wait):
    port = free_port()
    with start(port) as address:
        waiting = wait(result_at(address).get, timeout=60)
        wait_until(lambda: listening(address))
    with start(port):
        wait_until(lambda: listening(address))
        store(address)
        assert is_that(waiting.result(timeout=30))


def test_a_result_stored_right_after_the_look_for_it_is_heard(start, result_at, wait, monkeypatch):
    port = free_port()
    with start(port) as address:
        result = result_at(address)
        waiting = wait(result.get, timeout=60)
        wait_until(lambda: listening(address))
        client = result.backend.client
        looked = client.mget

        def look_too_early(names: list[bytes]) -> Any:
            found = looked(names)
            store(address)
            return found

        monkeypatch.setattr(client, "mget", look_too_early)
    with start(port):
        assert is_that(waiting.result(timeout=30))


def test_a_wait_that_begins_in_an_outage_ends_with_the_result(start, result_at, wait):
    port = free_port()
    with start() as elsewhere:
        store(elsewhere)
    result = result_at(f"redis://127.0.0.1:{port}/0")
    waiting = wait(result.get, timeout=60)
    wait_until(lambda: result.backend.result_consumer.subscribed_to)
    assert not waiting.done()
    with start(port):
        assert is_that(waiting.result(timeout=30))


@pytest.mark.parametrize("timeout", [0, 0.5, 1.5])
def test_a_wait_in_an_outage_ends_at_its_timeout(result_at, timeout):
    result = result_at(f"redis://127.0.0.1:{free_port()}/0")
    began = time.monotonic()
    with pytest.raises(celery.exceptions.TimeoutError):
        result.get(timeout=timeout)
    assert timeout <= time.monotonic() - began < timeout + 1


def test_an_outage_that_comes_in_a_wait_does_not_lengthen_it(start, result_at, wait):
    with start() as address:
        waiting = wait(result_at(address).get, timeout=2.5)
        began = time.monotonic()
        wait_until(lambda: listening(address))
    with pytest.raises(celery.exceptions.TimeoutError):
        waiting.result(timeout=30)
    assert time.monotonic() - began < 4


def test_each_of_many_waits_survives_outages(start, backend_at, wait):
    port = free_port()
    names = [f"task {n}" for n in range(8)]
    with start(port) as address:
        backend = backend_at(address)
        waits = [wait(EmbedResult(name, backend=backend, app=app).get, timeout=60) for name in names]
        wait_until(lambda: len(backend.result_consumer.subscribed_to) == len(names))
    for name in names:
        with start(port):
            store(address, name)
    with start(port):
        assert all(is_that(one.result(timeout=30)) for one in waits)


def test_a_group_waits_for_a_server_that_is_away(start, backend_at, wait):
    port = free_port()
    with start(port) as address:
        backend = backend_at(address)
        members = [EmbedResult(name, backend=backend, app=app) for name in "ab"]
        group = GroupResult("group", members, app=SimpleNamespace(backend=backend))
        waiting = wait(group.get, timeout=60)
        store(address, "a")
        wait_until(lambda: len(backend.result_consumer.subscribed_to) == 1)
    with start() as elsewhere:
        store(elsewhere, "b")
    with start(port):
        got = waiting.result(timeout=30)
        assert len(got) == 2
        assert all(is_that(each) for each in got)


@pytest.mark.parametrize(
    "error",
    [
        ServerUnavailableError("ConnectionError"),
        redis.ConnectionError("a task's own"),
        redis.TimeoutError("a task's own"),
        OSError("a task's own"),
        RuntimeError("a task's own"),
    ],
)
@pytest.mark.parametrize("failed", ["task", "its parent"])
def test_an_error_of_the_task_itself_is_raised_and_not_waited_out(start, result_at, error, failed):
    with start() as address:
        result = result_at(address)
        result.parent = result_at(address, "its parent")
        store(address, failed, error, states.FAILURE)
        with pytest.raises(type(error)) as raised:
            result.get(timeout=30)
        assert str(raised.value) == str(error)


def test_a_parent_that_cannot_be_asked_is_asked_again(start, result_at, wait):
    port = free_port()
    with start() as elsewhere:
        store(elsewhere, "its parent", ValueError("too odd"), states.FAILURE)
    address = f"redis://127.0.0.1:{port}/0"
    result = result_at(address, parent=result_at(address, "its parent"))
    waiting = wait(result.get, timeout=60)
    wait_until(lambda: result.backend.result_consumer.subscribed_to)
    with start(port), pytest.raises(ValueError, match="too odd"):
        waiting.result(timeout=30)


def test_a_refused_password_is_not_waited_out(start, result_at):
    with start() as address:
        with redis.Redis.from_url(address) as client:
            client.config_set("requirepass", "secret")
        with pytest.raises(redis.AuthenticationError):
            result_at(address).get(timeout=30)


def test_the_options_of_get_reach_celery(start, result_at):
    with start() as address:
        store(address, "failed", ValueError("no"), states.FAILURE)
        store(address)
        told: list[Any] = []
        result_at(address).get(30, callback=lambda *given: told.append(given), interval=0.1)
        assert told[0][0] == "task"
        assert is_that(told[0][1])
        failure = result_at(address, "failed").get(timeout=30, propagate=False)
        assert isinstance(failure, ValueError)


def test_sending_is_refused_while_results_could_not_be_read(start, backend_at):
    backend = backend_at(f"redis://127.0.0.1:{free_port()}/0")
    backend.retry_policy = {**backend.retry_policy, "max_retries": 1, "interval_max": 0.1}
    with pytest.raises(redis.ConnectionError):
        backend.on_task_call(None, "task")


def test_sending_waits_for_a_server_that_comes_back(start, backend_at, wait):
    port = free_port()
    backend = backend_at(f"redis://127.0.0.1:{port}/0")
    sending = wait(backend.on_task_call, None, "task")
    wait_until(lambda: backend.result_consumer.subscribed_to)
    with start(port) as address:
        sending.result(timeout=30)
        wait_until(lambda: listening(address))


def test_the_app_reads_its_results_patiently(server):
    assert type(app.backend) is ResultBackend
