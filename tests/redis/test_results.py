"""What a worker stores is what its caller gets, through the package's own app."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sutra_tasks import errors
from tests.conftest import wait_until
from tests.redis.results import ERRORS, TEXT, VALUES, described

if TYPE_CHECKING:
    import subprocess

    import redis

Process = Callable[..., str]
Get = Callable[..., dict[str, dict[str, Any]]]


def record(task_id: str) -> str:
    return f"celery-task-meta-{task_id}"


def records(client: redis.Redis) -> dict[str, dict[str, Any]]:
    """Return what is stored of every task, without its moment."""
    found = {}
    for name in client.scan_iter():
        stored: Any = client.get(name)
        found[name.decode()] = json.loads(stored)
        assert found[name.decode()].pop("date_done")
    return found


@pytest.mark.parametrize("storer", ["worker", "stock"])
def test_a_caller_gets_the_values_and_errors_that_were_stored(
    process: Process, get: Get, storer: str
) -> None:
    process(storer)
    expected = {name: described(stored) for name, stored in {**VALUES, **ERRORS}.items()}
    assert get(*expected) == expected


def test_every_error_of_the_package_can_be_stored() -> None:
    assert set(ERRORS) == set(errors.__all__)
    assert all(type(error) is getattr(errors, name) for name, error in ERRORS.items())


def test_a_worker_stores_the_same_record_as_celerys_own_backend(
    process: Process, client: redis.Redis
) -> None:
    process("stock")
    stock = records(client)
    client.flushdb()
    process("worker")
    assert records(client) == stock


def test_a_result_is_kept_as_long_as_its_setting_says(process: Process, client: redis.Redis) -> None:
    process("worker", SUTRA_RESULT_TTL_S="77")
    lifetimes = {client.ttl(name) for name in client.scan_iter()}
    assert len(client.keys()) == len(VALUES) + len(ERRORS)
    assert max(lifetimes) <= 77
    assert min(lifetimes) > 77 - 30


def test_a_result_holds_no_text_and_no_argument(process: Process, client: redis.Redis) -> None:
    process("worker")
    for stored in records(client).values():
        assert TEXT not in json.dumps(stored)
        assert set(stored) == {"status", "result", "traceback", "children", "task_id"}


def test_a_caller_that_waits_hears_of_the_result(
    process: Process, start: Callable[..., subprocess.Popen[bytes]], client: redis.Redis
) -> None:
    caller = start("get", "many", "EncodingError")
    wait_until(client.pubsub_channels)
    process("worker")
    answer, said = caller.communicate(timeout=30)
    assert caller.returncode == 0, said.decode()
    assert json.loads(answer) == {
        "many": described(VALUES["many"]),
        "EncodingError": described(ERRORS["EncodingError"]),
    }


def test_a_success_is_final(process: Process, get: Get) -> None:
    process("worker")
    process("fail", "one", "details", "ModelError")
    got = get("one", "details", "ModelError")
    assert got["one"] == described(VALUES["one"])
    assert got["details"] == described(VALUES["details"])
    assert got["ModelError"] == described(ERRORS["EncodingError"])


def test_a_success_replaces_a_failure(process: Process, get: Get) -> None:
    process("fail", "one")
    assert get("one")["one"] == described(ERRORS["EncodingError"])
    process("worker")
    assert get("one")["one"] == described(VALUES["one"])


def test_results_go_to_their_own_server_if_there_is_one(
    process: Process, url: str, client: redis.Redis
) -> None:
    process("worker", SUTRA_BROKER_URL="redis://127.0.0.1:1/0", SUTRA_RESULT_URL=url)
    assert client.exists(record("one"))


class Touch:
    """Unpickled, it creates a file: what pickle lets a stranger do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickled_result_is_refused_and_never_run(
    get: Get, client: redis.Redis, tmp_path: Path
) -> None:
    touched = tmp_path / "touched"
    stored = {"status": "SUCCESS", "result": Touch(touched), "task_id": "p", "children": []}
    client.set(record("p"), pickle.dumps(stored), ex=60)
    assert get("p")["p"]["type"] == "kombu.exceptions.DecodeError"
    assert not touched.exists()


def test_an_error_that_names_no_exception_is_not_called(
    get: Get, client: redis.Redis, tmp_path: Path
) -> None:
    touched = tmp_path / "touched"
    failure = {"exc_type": "system", "exc_module": "os", "exc_message": [f"touch {touched}"]}
    stored = {"status": "FAILURE", "result": failure, "task_id": "e", "children": []}
    client.set(record("e"), json.dumps(stored), ex=60)
    assert get("e")["e"]["type"] == "celery.exceptions.SecurityError"
    assert not touched.exists()
