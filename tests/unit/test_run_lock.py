"""The lock of a run is kept by a thread, whatever the run does meanwhile."""

import threading
from typing import Any

import pytest
import redis

from sutra_tasks.broker.result_backend import LeaseEnded
from sutra_tasks.distillation.worker.run_lock import DELETE_IF_EQUAL, TAKE_RUN_LOCK, RunLock
from sutra_tasks.errors import DistillationUnderWayError

WITHIN_S = 20


class Server:
    """Answers with what tests say, in order; then says that the lock is one's own."""

    def __init__(self, *answers: Any) -> None:
        self.answers, self.scripts = [*answers], list[str]()
        self.kept = threading.Event()
        self.answered = threading.Event()

    def evalsha(self, script: str, *_: Any) -> Any:
        self.scripts.append(script)
        answer = self.answers.pop(0) if self.answers else None
        if self.scripts.count(TAKE_RUN_LOCK.sha) >= 4:
            self.kept.set()
        if isinstance(answer, Exception):
            raise answer
        return answer


def lock(server: Server) -> RunLock:
    client: Any = server
    return RunLock(client, "small", "task-1", "worker.1", renew_s=0.001)


def test_a_lock_is_renewed_while_its_run_is_silent_and_let_go_of_at_its_end() -> None:
    server = Server()
    with lock(server) as held:
        assert server.kept.wait(WITHIN_S)
        held.check()
    assert server.scripts[-1] == DELETE_IF_EQUAL.sha
    assert server.scripts.count(DELETE_IF_EQUAL.sha) == 1


def test_one_that_another_task_has_is_not_taken() -> None:
    with pytest.raises(DistillationUnderWayError) as refused, lock(Server(b"task-2 worker.2")):
        pytest.fail("taken")
    assert refused.value.args == ("small", "task-2")


def test_a_server_that_is_away_loses_no_lock() -> None:
    server = Server(None, redis.ConnectionError(), redis.TimeoutError())
    with lock(server) as held:
        assert server.kept.wait(WITHIN_S)
        held.check()


@pytest.mark.parametrize(
    ("holder", "error"),
    [(b"task-2 worker.2", DistillationUnderWayError), (b"task-1 worker.2", LeaseEnded)],
)
def test_a_lock_that_is_lost_is_told_and_not_taken_back(holder: bytes, error: type[Exception]) -> None:
    server = Server(None, holder)
    held = lock(server)
    with held:
        held._thread.join(WITHIN_S)
        assert not held._thread.is_alive()
        with pytest.raises(error):
            held.check()
    assert server.scripts.count(TAKE_RUN_LOCK.sha) == 2
