"""A document that is gone before its caller has an outcome: whoever finds out tells the caller."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from sutra_tasks import keys
from sutra_tasks.errors import EncodingError, IncompleteDocumentError
from sutra_tasks.fanout.messages import BODY
from sutra_tasks.fanout.overdue import resend_overdue
from tests.redis.fanout.parts import begin, forget_sent, kept, make_overdue, result_of, sent_to
from tests.redis.peers import waiting

if TYPE_CHECKING:
    import redis
    from celery import Celery

    from sutra_tasks.fanout.documents import Documents

LOST = (3, 3, 0.0)


@pytest.fixture
def body(client: redis.Redis, results: redis.Redis, documents: Documents) -> str:
    """Lose a document of three parts, one of them done; return the body that each part's message has."""
    begin(documents)
    bodies = {json.loads(raw)["headers"][BODY] for raw in waiting(client, keys.EMBED_QUEUE)}
    documents.join("1", 1, result_of(1))
    results.delete(keys.document("1"))
    forget_sent(client)
    (one,) = bodies
    assert isinstance(one, str)
    return one


def test_the_first_part_that_ends_sends_the_body_with_the_loss(
    client: redis.Redis, documents: Documents, body: str
) -> None:
    documents.join("1", 0, result_of(0), body)
    documents.join("1", 2, result_of(2), body)
    assert [json.loads(raw) for raw in waiting(client, keys.EMBED_QUEUE)] == [json.loads(body)]
    found = documents.store.ended("1")
    assert found is not None
    assert isinstance(found.error, IncompleteDocumentError)
    assert found.error.args == LOST
    assert "maxmemory-policy" in str(found.error)


def test_a_part_that_has_nothing_to_do_because_of_the_loss_tells_it_too(
    client: redis.Redis, documents: Documents, body: str
) -> None:
    assert documents.store.part("1", 0) is None
    documents.join("1", 0, None, body)
    assert sent_to(client) == ["1"]


def test_a_part_that_fails_tells_its_own_error(
    client: redis.Redis, documents: Documents, body: str
) -> None:
    documents.fail("1", EncodingError("gpu0", 2, "no"), body)
    assert sent_to(client) == ["1"]
    found = documents.store.ended("1")
    assert found is not None
    assert isinstance(found.error, EncodingError)


def test_what_is_left_of_a_lost_document_is_swept_like_any_other(
    client: redis.Redis, results: redis.Redis, documents: Documents, body: str
) -> None:
    documents.join("1", 0, None, body)
    forget_sent(client)  # the body is lost as well
    make_overdue(results, "1")
    resend_overdue(documents)
    assert sent_to(client) == ["1"]
    assert results.ttl(keys.document("1")) > 0
    documents.store.delete("1")
    assert kept(results) == set()


@pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning")  # Celery's
@pytest.mark.parametrize("outcome", ["SUCCESS", "FAILURE", None])
def test_a_part_that_comes_late_tells_nothing(
    client: redis.Redis,
    results: redis.Redis,
    documents: Documents,
    caller: Celery,
    *,
    body: str,
    outcome: str | None,
) -> None:
    if outcome is None:
        results.delete(keys.result("1"))  # the caller forgot it
    else:
        caller.backend.store_result("1", [] if outcome == "SUCCESS" else ValueError("no"), outcome)
    documents.join("1", 0, result_of(0), body)
    documents.fail("1", EncodingError("gpu0", 2, "no"), body)
    assert sent_to(client) == []
    assert documents.loss("1") is None
    assert kept(results) <= {keys.documents()}


def test_the_sweep_tells_the_caller_when_no_part_does(
    results: redis.Redis, documents: Documents, caller: Celery, body: str
) -> None:
    assert body
    resend_overdue(documents)
    assert caller.AsyncResult("1").state == "PROGRESS"  # a part may still know whom to tell as well
    make_overdue(results, "1")
    resend_overdue(documents)
    with pytest.raises(IncompleteDocumentError) as told:
        caller.AsyncResult("1").get(timeout=5)
    assert told.value.args == LOST
    assert results.ttl(keys.result("1")) > 0
    assert kept(results) == set()


@pytest.mark.usefixtures("client")
def test_a_caller_who_wants_no_outcome_keeps_no_progress(
    results: redis.Redis, documents: Documents
) -> None:
    begin(documents)
    assert results.exists(keys.result("1"))
    documents.store.delete("1")
    left: Any = list(results.scan_iter())
    assert left == []
