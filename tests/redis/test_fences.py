"""A worker whose lease ended stores vectors and no errors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import celery
import pytest
import redis
from celery.app.task import Context
from celery.exceptions import Reject

from sutra_tasks.broker.result_backend import LeaseEnded, RequeueMessage, ResultBackend
from sutra_tasks.errors import EncodingError
from sutra_tasks.membership.reaper import reap
from tests.conftest import disconnect
from tests.redis.peers import absent_server, full_memory

if TYPE_CHECKING:
    from celery.canvas import Signature

ERROR = EncodingError("gpu0", 3, "out of memory")
OURS, OTHERS = "gpu0.1", "gpu1.1"

Tell = Callable[[Any, Context], None]


@pytest.fixture(autouse=True)
def _swept(_nothing_is_left_behind: None, client: redis.Redis) -> Iterator[None]:
    yield
    client.flushdb()


@pytest.fixture
def app(url: str) -> celery.Celery:
    """A worker's app, as far as its results go."""
    made = celery.Celery("worker", broker=url, set_as_current=False)
    made.conf.broker_transport_options = {"incarnation": OURS}
    made.conf.task_ignore_result = True
    return made


@pytest.fixture
def backend(app: celery.Celery, url: str) -> Iterator[Any]:
    made = ResultBackend(app=app, url=url)
    yield made
    disconnect(made)


@pytest.fixture
def part(app: celery.Celery) -> Context:
    """The request of a task that is one of a chord's two."""
    body: Signature = app.signature("project.done", queue="project")
    body["chord_size"] = 2
    return Context(id="t", group="g", group_index=0, chord=body, delivery_info={})


def stored(client: redis.Redis) -> str | None:
    """Return what became of the task, as far as its caller can know."""
    record: Any = client.get("celery-task-meta-t")
    return None if record is None else json.loads(record)["status"]


def touched(client: redis.Redis) -> bool:
    """Say whether anything of the chord was changed."""
    return bool(client.keys("*g.*"))


def fail(backend: Any, part: Context) -> None:
    backend.mark_as_failure("t", ERROR, request=part)


def revoke(backend: Any, part: Context) -> None:
    backend.mark_as_revoked("t", "expired", request=part)


def fail_unheard(backend: Any, part: Context) -> None:
    """Fail a task with ``ignore_result=True``."""
    backend.mark_as_failure("t", ERROR, request=part, store_result=False)


@pytest.mark.parametrize("tell", [fail, fail_unheard, revoke])
def test_a_process_whose_lease_ended_stores_no_error_and_tells_no_chord(
    client: redis.Redis, backend: Any, part: Context, tell: Tell
) -> None:
    reap(client, client, OURS)
    with pytest.raises(LeaseEnded):
        tell(backend, part)
    assert stored(client) is None
    assert not touched(client)


@pytest.mark.parametrize(("tell", "expected"), [(fail, "FAILURE"), (revoke, "REVOKED")])
def test_a_process_stores_errors_whoever_elses_lease_ended(
    client: redis.Redis,
    backend: Any,
    part: Context,
    tell: Tell,
    expected: str,
) -> None:
    reap(client, client, OTHERS)
    tell(backend, part)
    assert stored(client) == expected
    assert touched(client)


def test_a_process_whose_lease_ended_stores_vectors(client: redis.Redis, backend: Any) -> None:
    reap(client, client, OURS)
    backend.mark_as_done("t", [1.0], request=Context(id="t", delivery_info={}))
    assert stored(client) == "SUCCESS"


def test_a_late_error_comes_neither_before_nor_after_the_second_run(
    client: redis.Redis, backend: Any, part: Context
) -> None:
    reap(client, client, OURS)
    with pytest.raises(LeaseEnded):
        fail(backend, part)
    client.set("celery-task-meta-t", '{"status": "SUCCESS"}', ex=60)  # the second run's
    with pytest.raises(LeaseEnded):
        fail(backend, part)
    assert stored(client) == "SUCCESS"


def test_a_lease_that_ends_between_two_questions_is_seen_where_the_error_is_stored(
    client: redis.Redis, backend: Any, part: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    reap(client, client, OURS)
    monkeypatch.setattr(backend.client, "exists", lambda _: 0)  # a moment before
    with pytest.raises(LeaseEnded):
        fail(backend, part)
    assert stored(client) is None
    assert not touched(client)


def test_a_client_has_no_lease_that_could_end(client: redis.Redis, url: str, part: Context) -> None:
    app = celery.Celery("client", broker=url, set_as_current=False)
    reap(client, client, OURS)
    backend = ResultBackend(app=app, url=url)
    fail(backend, part)
    disconnect(backend)
    assert stored(client) == "FAILURE"


# --- what is the server's fault ------------------------------------------------------------------


def test_an_error_of_the_server_is_no_tasks(client: redis.Redis, backend: Any, part: Context) -> None:
    with pytest.raises(RequeueMessage):
        backend.mark_as_failure("t", redis.ConnectionError("refused"), request=part)
    assert stored(client) is None
    assert not touched(client)


def test_what_a_full_server_does_not_store_is_requeued(
    client: redis.Redis, backend: Any, part: Context
) -> None:
    with full_memory(client):
        with pytest.raises(RequeueMessage):
            fail(backend, part)
        with pytest.raises(RequeueMessage):
            backend.mark_as_done("t", [1.0], request=part)
    assert stored(client) is None
    assert not touched(client)


def test_what_an_absent_server_does_not_store_is_requeued(
    backend: Any, part: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "client", absent_server())
    with pytest.raises(RequeueMessage):
        fail(backend, part)


def test_celery_requeues_a_message_whose_result_was_not_stored() -> None:
    assert issubclass(RequeueMessage, Reject)
    assert RequeueMessage("away").requeue
    assert LeaseEnded().requeue


def test_an_error_its_caller_does_not_want_is_told_to_its_chord_only(
    client: redis.Redis, backend: Any, part: Context
) -> None:
    fail_unheard(backend, part)
    assert stored(client) is None
    assert touched(client)
