"""One run at a time makes the next version of a model, as the server sees it."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from sutra_tasks import keys
from sutra_tasks.broker.result_backend import LeaseEnded
from sutra_tasks.distillation.worker.run_lock import RunLock
from sutra_tasks.errors import DistillationUnderWayError
from tests.conftest import wait_until

if TYPE_CHECKING:
    import redis

NAME = keys.distilling("small")


def lock(client: redis.Redis, task: str, worker: str, renew_s: float = 3600.0) -> RunLock:
    return RunLock(client, "small", task, worker, renew_s=renew_s)


def test_two_tasks_exclude_each_other_and_the_end_of_one_frees_the_model(client: redis.Redis) -> None:
    with lock(client, "a", "w1"):
        assert 0 < client.ttl(NAME) <= keys.DISTILLING_S
        with pytest.raises(DistillationUnderWayError), lock(client, "b", "w2"):
            pytest.fail("taken")
        with pytest.raises(DistillationUnderWayError), lock(client, "a1", "w1"):
            pytest.fail("its name begins alike")
    assert not client.exists(NAME)
    with lock(client, "b", "w2"):
        assert client.get(NAME) == b"b w2"


def test_a_task_that_is_delivered_again_takes_over_from_itself_and_keeps_it(client: redis.Redis) -> None:
    with ExitStack() as ended:
        old = ended.enter_context(lock(client, "a", "w1", renew_s=0.01))
        old.check()
        ended.enter_context(lock(client, "a", "w2"))
        wait_until(lambda: not old._thread.is_alive())
        with pytest.raises(LeaseEnded):
            old.check()
        assert client.get(NAME) == b"a w2"


def test_a_lock_that_expired_is_taken_again_if_nobody_has_it(client: redis.Redis) -> None:
    with lock(client, "a", "w1", renew_s=0.01) as held:
        client.delete(NAME)
        wait_until(lambda: client.get(NAME) == b"a w1")
        held.check()


def test_one_that_lost_its_lock_leaves_it_to_who_has_it(client: redis.Redis) -> None:
    with lock(client, "a", "w1"):
        client.set(NAME, "b w2", ex=60)
    assert client.get(NAME) == b"b w2"
