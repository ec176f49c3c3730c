"""The sweep of overdue documents: what is lost is sent again, and at last given up."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
import redis

from sutra_tasks import keys
from sutra_tasks.client.admission import Backlog
from sutra_tasks.errors import IncompleteDocumentError
from sutra_tasks.fanout.overdue import DOCUMENTS_AT_ONCE, MOST_RESENDS, overdue_after_s, resend_overdue
from tests.redis.fanout.parts import (
    OVERDUE_S,
    begin,
    documents_on,
    due_in_s,
    forget_sent,
    kept,
    make_overdue,
    result_of,
    sent_to,
)
from tests.redis.peers import full_memory

if TYPE_CHECKING:
    from sutra_tasks.fanout.documents import Documents


def test_nothing_is_sent_again_before_its_time(
    client: redis.Redis, results: redis.Redis, documents: Documents
) -> None:
    begin(documents)
    forget_sent(client)
    resend_overdue(documents)
    make_overdue(results, "1", by_s=-5)
    resend_overdue(documents)
    assert sent_to(client) == []


def test_overdue_parts_are_sent_again_and_later_each_time_and_then_given_up(
    client: redis.Redis, results: redis.Redis, documents: Documents
) -> None:
    begin(documents, 1, 2, 1, 1, devices=["g0", "g0", "g0"])
    documents.join("1", 1, result_of(1))
    for resend in range(1, MOST_RESENDS + 1):
        forget_sent(client)
        make_overdue(results, "1")
        resend_overdue(documents)
        assert sent_to(client) == ["1:0", "1:2"]
        wait_s = OVERDUE_S * 2**resend
        assert wait_s - 5 <= due_in_s(results, "1") <= wait_s
        resend_overdue(documents)
        assert sent_to(client) == ["1:0", "1:2"]
    forget_sent(client)
    make_overdue(results, "1")
    resend_overdue(documents)
    assert sent_to(client) == ["1"]
    found = documents.store.ended("1")
    assert found is not None
    assert isinstance(found.error, IncompleteDocumentError)
    assert found.error.args == (2, 3, OVERDUE_S * (1 + 2 + 4 + 8))


def test_progress_starts_the_patience_anew(
    client: redis.Redis, results: redis.Redis, documents: Documents
) -> None:
    begin(documents, 1, *[1] * 9)
    for index in range(8):  # each time but for one it would have been given up
        make_overdue(results, "1")
        resend_overdue(documents)
        make_overdue(results, "1")
        resend_overdue(documents)
        documents.join("1", index, result_of(index))
        assert OVERDUE_S - 5 <= due_in_s(results, "1") <= OVERDUE_S
    assert documents.store.part("1", 8) is not None
    assert documents.store.ended("1") is None


def test_a_part_that_counted_already_is_no_progress(results: redis.Redis, documents: Documents) -> None:
    begin(documents)
    documents.join("1", 0, result_of(0))
    make_overdue(results, "1")
    documents.join("1", 0, result_of(0))
    documents.join("1", 0, None)
    assert due_in_s(results, "1") < 0


@pytest.mark.parametrize(
    ("tokens", "speed", "expected"),
    [(0, 100.0, 60), (2000, 100.0, 60), (30_000, 100.0, 600), (10**6, 0.0, 60)],
)
def test_a_backlog_is_waited_for_twice_as_long_as_it_takes(
    tokens: int, speed: float, expected: int
) -> None:
    assert overdue_after_s(Backlog(tokens, speed), 60.0) == expected
    assert overdue_after_s(None, 60.0) == 60


def test_parts_that_may_be_waiting_their_turn_are_not_sent_again(
    client: redis.Redis, results: redis.Redis, documents: Documents
) -> None:
    begin(documents)
    forget_sent(client)
    client.set(keys.backlog(), Backlog(tokens=30_000, tokens_per_s=100.0).to_json(), ex=60)
    make_overdue(results, "1", by_s=530)
    resend_overdue(documents)
    assert sent_to(client) == []
    make_overdue(results, "1", by_s=541)
    resend_overdue(documents)
    assert sent_to(client) == ["1:0", "1:1", "1:2"]


@pytest.mark.parametrize("given_up", [False, True])
def test_a_body_that_was_lost_is_sent_again_however_often(
    client: redis.Redis, results: redis.Redis, documents: Documents, given_up: bool
) -> None:
    begin(documents)
    if given_up:
        documents.fail("1", ValueError("no"))
    else:
        for index in range(3):
            documents.join("1", index, result_of(index))
    for _ in range(MOST_RESENDS + 3):
        forget_sent(client)
        make_overdue(results, "1")
        resend_overdue(documents)
        assert sent_to(client) == ["1"]
    found = documents.store.ended("1")
    assert found is not None
    assert (found.error is not None) == given_up


def test_a_document_that_is_gone_is_forgotten(
    client: redis.Redis, results: redis.Redis, documents: Documents
) -> None:
    begin(documents)
    forget_sent(client)
    results.delete(keys.document("1"))
    make_overdue(results, "1")
    resend_overdue(documents)
    assert kept(results) == set()
    assert sent_to(client) == []


def test_many_sweepers_send_each_missing_part_once(
    client: redis.Redis, results: redis.Redis, documents: Documents, url: str, results_url: str
) -> None:
    ids = [begin(documents, number) for number in range(40)]
    forget_sent(client)
    make_overdue(results, *ids)
    start = threading.Barrier(4)

    def run() -> None:
        with redis.Redis.from_url(url) as one, redis.Redis.from_url(results_url) as other:
            own = documents_on(one, other)
            start.wait()
            resend_overdue(own)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(sent_to(client)) == sorted(f"{number}:{part}" for number in ids for part in range(3))


def test_one_sweep_is_bounded_and_the_next_goes_on(
    client: redis.Redis, results: redis.Redis, documents: Documents
) -> None:
    ids = [begin(documents, number, 1) for number in range(DOCUMENTS_AT_ONCE + 7)]
    forget_sent(client)
    make_overdue(results, *ids)
    resend_overdue(documents)
    assert len(sent_to(client)) == DOCUMENTS_AT_ONCE
    resend_overdue(documents)
    assert sorted(sent_to(client)) == sorted(f"{number}:0" for number in ids)


def test_a_sweep_of_a_full_server_loses_nothing(
    client: redis.Redis, results: redis.Redis, documents: Documents
) -> None:
    begin(documents)
    forget_sent(client)
    make_overdue(results, "1")
    with full_memory(client), pytest.raises(redis.ResponseError):
        resend_overdue(documents)
    make_overdue(results, "1")
    resend_overdue(documents)
    assert sent_to(client) == ["1:0", "1:1", "1:2"]
