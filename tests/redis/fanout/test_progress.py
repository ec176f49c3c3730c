"""What a caller sees of a long text before it has an outcome."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from sutra_tasks import keys
from tests.redis.fanout.parts import (
    RESULT_TTL_S,
    begin,
    result_of,
)

if TYPE_CHECKING:
    import redis
    from celery import Celery

    from sutra_tasks.fanout.documents import Documents


def test_a_caller_sees_how_many_parts_are_done(
    documents: Documents, results: redis.Redis, caller: Celery
) -> None:
    result = caller.AsyncResult("1")
    assert result.state == "PENDING"
    begin(documents)
    assert (result.state, result.info) == ("PROGRESS", {"done": 0, "of": 3})
    assert RESULT_TTL_S - 60 < results.ttl(keys.result("1")) <= RESULT_TTL_S
    documents.join("1", 2, result_of(2))
    assert (result.state, result.info) == ("PROGRESS", {"done": 1, "of": 3})
    documents.join("1", 2, result_of(2))
    assert result.info == {"done": 1, "of": 3}
    documents.join("1", 0, result_of(0))
    assert (result.state, result.info) == ("PROGRESS", {"done": 2, "of": 3})
    documents.join("1", 1, result_of(1))
    assert result.info == {"done": 2, "of": 3}  # the answer follows at once
    assert RESULT_TTL_S - 60 < results.ttl(keys.result("1")) <= RESULT_TTL_S
    assert not result.ready()


def test_progress_is_told_to_who_listens(documents: Documents, results: redis.Redis) -> None:
    begin(documents)
    with results.pubsub(ignore_subscribe_messages=True) as listening:  # type: ignore[no-untyped-call]
        listening.subscribe(keys.result("1"))
        documents.join("1", 0, result_of(0))
        heard = None
        while heard is None:
            heard = listening.get_message(timeout=10)
    assert json.loads(heard["data"])["result"] == {"done": 1, "of": 3}


@pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning")  # Celery's
@pytest.mark.parametrize("state", ["SUCCESS", "FAILURE", "REVOKED"])
def test_a_result_is_never_overwritten_by_progress(
    documents: Documents, caller: Celery, state: str
) -> None:
    begin(documents)
    documents.join("1", 0, result_of(0))
    assert caller.AsyncResult("1").state == "PROGRESS"
    stored = [1, 2] if state == "SUCCESS" else ValueError("no")
    caller.backend.store_result("1", stored, state)
    documents.join("1", 1, result_of(1))
    assert caller.AsyncResult("1").state == state
    documents.store.delete("1")
    begin(documents)
    assert caller.AsyncResult("1").state == state
    documents.join("1", 1, result_of(1))
    assert caller.AsyncResult("1").state == state


def test_a_document_that_was_given_up_makes_no_progress(documents: Documents, caller: Celery) -> None:
    begin(documents)
    documents.fail("1", ValueError("no"))
    documents.join("1", 1, result_of(1))
    assert caller.AsyncResult("1").info == {"done": 0, "of": 3}
