"""One task's computation on a device: among others or alone, and what follows if it has no answer."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from celery.exceptions import Ignore, Reject, TaskRevokedError
from celery.worker.state import revoked

from sutra_tasks import keys
from sutra_tasks.batching.jobs import DeviceBroken, Drained, Unwanted
from sutra_tasks.broker.attempts import ATTEMPTS
from sutra_tasks.device import execution as module
from sutra_tasks.device.execution import Execution, is_suspect
from sutra_tasks.errors import EncodingError
from sutra_tasks.settings import Settings
from tests.conftest import wait_until

MARK = keys.suspect("g0.1")
REVOKED = "revoked-by-its-caller"


class Marks:
    """The server, of which a test sees the keys."""

    def __init__(self) -> None:
        self.keys: dict[str, str] = {}

    def set(self, key: str, value: str, *, ex: int) -> None:
        assert ex > 0
        self.keys[key] = value

    def delete(self, key: str) -> None:
        del self.keys[key]


class Request(SimpleNamespace):
    """Celery's request of one task."""

    name, group, expired, tells_its_caller = keys.EMBED_TASK, None, False, False

    def maybe_expire(self) -> bool:
        return self.expired

    def revoked(self) -> bool:
        return self.tells_its_caller


def request(task_id: str = "it", attempts: int = 0, **facts: Any) -> Request:
    message = SimpleNamespace(headers={ATTEMPTS: attempts}, sutra_failed=False)
    return Request(id=task_id, message=message, **facts)


@pytest.fixture
def server() -> Marks:
    return Marks()


@pytest.fixture
def execution(server: Marks, monkeypatch: pytest.MonkeyPatch) -> Execution:
    monkeypatch.setattr(module, "ROUTERS_KNOW_S", 0)
    return Execution(Settings(device_id="g0", max_attempts=3), server, "g0.1")  # type: ignore[arg-type]


@pytest.fixture
def revoked_task() -> Iterator[None]:
    revoked.add(REVOKED)
    yield
    revoked.discard(REVOKED)


@pytest.mark.parametrize(
    ("attempts", "max_attempts", "expected"),
    [(0, 3, False), (1, 3, False), (2, 3, True), (3, 9, True), (1, 2, True), (0, 1, False)],
)
def test_a_message_is_suspect_after_two_deaths_or_before_its_last_attempt(
    attempts: int, max_attempts: int, expected: bool
) -> None:
    assert is_suspect({ATTEMPTS: attempts}, max_attempts) is expected


def test_tasks_compute_side_by_side(execution: Execution) -> None:
    met = threading.Barrier(4)

    def compute(n: int) -> None:
        execution.begin(request(str(n)), object())
        with execution.admitted():
            met.wait(10)

    with ThreadPoolExecutor(4) as threads:
        assert len(list(threads.map(compute, range(4)))) == 4


def test_a_suspect_is_computed_alone_and_named_meanwhile(execution: Execution, server: Marks) -> None:
    computing, seen = set[str](), dict[str, tuple[set[str], dict[str, str]]]()
    may_end = threading.Event()

    def compute(task_id: str, attempts: int) -> None:
        execution.begin(request(task_id, attempts), object())
        with execution.admitted():
            computing.add(task_id)
            assert may_end.wait(10)
            seen[task_id] = (computing.copy(), server.keys.copy())
            computing.remove(task_id)

    with ThreadPoolExecutor() as threads:
        done = [threads.submit(compute, "before", 0)]
        wait_until(lambda: computing == {"before"})
        done.append(threads.submit(compute, "suspect", 2))
        wait_until(lambda: execution.lock._waiting == 1)
        done += [threads.submit(compute, f"after{n}", 1) for n in range(3)]
        may_end.set()
        for one in done:
            one.result(10)
    assert seen["suspect"] == ({"suspect"}, {MARK: "suspect"})
    assert all(marks == {} for task_id, (_, marks) in seen.items() if task_id != "suspect")
    assert server.keys == {}


def test_a_suspect_whose_computation_fails_is_no_longer_named(
    execution: Execution, server: Marks
) -> None:
    execution.begin(request(attempts=2), object())
    with pytest.raises(ZeroDivisionError), execution.admitted():
        raise ZeroDivisionError
    assert server.keys == {}


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({}, True),
        ({"expired": True}, False),
        ({"task_id": REVOKED}, False),
        ({"group": REVOKED}, True),  # an application's group has an id of its own
        ({"name": keys.PART_TASK, "group": REVOKED}, False),
        ({"name": keys.PART_TASK, "group": "it"}, True),
    ],
)
def test_a_job_is_wanted_until_its_caller_revokes_it_or_it_expires(
    execution: Execution, revoked_task: None, facts: dict[str, Any], expected: bool
) -> None:
    execution.begin(request(**facts), object())
    with execution.admitted() as context:
        assert context.is_wanted() is expected


def test_a_job_has_the_announcement_of_its_task(execution: Execution) -> None:
    announcement = object()
    execution.begin(request(), announcement)
    with execution.admitted() as context:
        assert context.announcement is announcement


@pytest.mark.parametrize(
    ("raised", "facts", "expected"),
    [
        (Unwanted(), {"tells_its_caller": True}, Ignore),
        (Unwanted(), {}, TaskRevokedError),
        (Drained(), {}, Reject),
        (DeviceBroken(0), {"attempts": 1}, Reject),
        (DeviceBroken(7), {"attempts": 2}, EncodingError),
        (KeyError(), {}, KeyError),
    ],
)
def test_each_way_to_have_no_answer_means_something_for_the_message(
    execution: Execution, raised: Exception, facts: dict[str, Any], expected: type[Exception]
) -> None:
    asked = request(**facts)
    execution.begin(asked, object())
    with pytest.raises(expected) as failed, execution.admitted():
        raise raised
    if isinstance(failed.value, Reject):
        assert failed.value.requeue
    if isinstance(failed.value, EncodingError):
        assert (failed.value.device, failed.value.position) == ("g0", 7)
    # Only a broken device counts as an attempt: it may fail on the message again.
    assert asked.message.sutra_failed is (isinstance(raised, DeviceBroken) and expected is Reject)
