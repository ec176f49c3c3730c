"""Documents on a real server: every part counts once, and the body is sent once."""

from __future__ import annotations

import json
import random
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import redis
from celery.exceptions import TaskRevokedError

from sutra_tasks import keys
from sutra_tasks.broker.load import weight_of
from sutra_tasks.broker.queues import lane
from sutra_tasks.chunking.answer import AnswerLayout, TextLayout
from sutra_tasks.client.call import Call
from sutra_tasks.errors import EncodingError, PoisonMessageError
from sutra_tasks.fanout.overdue import resend_overdue
from sutra_tasks.fanout.sender import PARTS_AT_ONCE, Sender
from sutra_tasks.membership.reaper import requeue_waiting
from tests.redis.fanout.parts import (
    CALL,
    OVERDUE_S,
    begin,
    documents_on,
    due_in_s,
    forget_sent,
    kept,
    make_overdue,
    new_document,
    result_of,
    sent_to,
)
from tests.redis.flow import Worker, load, message
from tests.redis.peers import full_memory, waiting

if TYPE_CHECKING:
    from celery import Celery

    from sutra_tasks.fanout.documents import Documents

# It begins.


def test_a_call_becomes_a_document_and_a_message_a_part(
    client: redis.Redis, results: redis.Redis, documents: Documents
) -> None:
    begin(documents, 1, 2, 1, 1)
    assert sent_to(client) == ["1:0", "1:1", "1:2"]
    assert kept(results) == {keys.document("1"), keys.documents()}
    assert keys.DOCUMENT_S - 60 < results.ttl(keys.document("1")) <= keys.DOCUMENT_S
    assert OVERDUE_S - 5 <= due_in_s(results, "1") <= OVERDUE_S
    assert results.hget(keys.document("1"), "call") is not None
    stored: Any = results.hvals(keys.document("1"))
    assert b"not kept" not in b"".join(stored)


def test_parts_go_to_the_devices_that_were_chosen_and_to_the_router_for_the_others(
    client: redis.Redis, documents: Documents
) -> None:
    begin(documents, 1, 2, 1, 1, 3, devices=["g0", "g1", None, "g0"], priority=6)
    assert sent_to(client, keys.device_queue("g0")) == ["1:0", "1:3"]
    assert sent_to(client, keys.device_queue("g1")) == ["1:1"]
    assert client.llen(lane(keys.EMBED_QUEUE, 6)) == 1
    assert client.llen(lane(keys.device_queue("g0"), 6)) == 2
    assert load(client, "g0") == {"messages": 2, "credit": 500, "tokens_dispatched": 500}
    assert load(client, "g1") == {"messages": 1, "credit": 100, "tokens_dispatched": 100}
    assert client.ttl(keys.load("g0")) > 0
    assert len(client.keys(keys.load("*"))) == 2


def test_more_parts_than_one_command_takes_all_go_out(client: redis.Redis, documents: Documents) -> None:
    chunks = [1] * (2 * PARTS_AT_ONCE + 1)
    begin(documents, 1, *chunks)
    assert sent_to(client) == [f"1:{n}" for n in range(len(chunks))]


def test_a_message_delivered_twice_begins_once(
    client: redis.Redis, results: redis.Redis, documents: Documents
) -> None:
    begin(documents)
    documents.join("1", 1, result_of(1))
    before = results.hgetall(keys.document("1"))
    forget_sent(client)
    begin(documents)
    assert results.hgetall(keys.document("1")) == before
    assert sent_to(client) == ["1:0", "1:2"]  # only what is missing


@pytest.mark.parametrize("now", [(4,), (1, 1, 1, 1), (1, 1, 1, 1, 1, 1)])
def test_a_document_stays_divided_as_it_began_whatever_the_fleet_is_by_now(
    client: redis.Redis, documents: Documents, now: tuple[int, ...]
) -> None:
    begin(documents, 1, 2, 1, 1)
    first = [json.loads(raw)["headers"] for raw in waiting(client, keys.EMBED_QUEUE)]
    forget_sent(client)
    begin(documents, 1, *now, devices=["g0"] * len(now))
    assert [json.loads(raw)["headers"] for raw in waiting(client, keys.EMBED_QUEUE)] == first
    assert load(client, "g0") == {}


def test_a_message_delivered_again_sends_nothing_for_a_document_that_was_given_up(
    client: redis.Redis, documents: Documents
) -> None:
    begin(documents)
    documents.fail("1", ValueError("no"))
    forget_sent(client)
    begin(documents)
    assert sent_to(client) == []


def test_what_died_between_writing_and_sending_is_made_good_by_the_next_delivery(
    client: redis.Redis, documents: Documents, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Sender, "send_parts", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            begin(documents)
    assert sent_to(client) == []
    begin(documents)
    assert sent_to(client) == ["1:0", "1:1", "1:2"]


# A part.


def test_a_part_gets_its_rows_and_whose_they_are(documents: Documents) -> None:
    whole = TextLayout(5, ((0, 1),), (1.0,))
    cut = TextLayout(900, ((0, 1), (1, 2), (2, 3)), (0.5, 0.25, 0.25))
    one = new_document(2, 2, 1)
    spread = replace(one, layout=AnswerLayout((cut, whole, whole), "mean"), model="m", space="s:2")
    documents.begin(message(1), ([], {}, {}), spread)
    positions, rows = [], []
    for index in range(3):
        part = documents.store.part("1", index)
        assert part is not None
        assert (part.model, part.space) == ("m", "s:2")
        positions.append(part.positions)
        rows.append(part.rows)
    assert positions == [[0, 0], [0, 1], [2]]
    assert rows == one.parts


def test_a_part_that_nobody_wants_any_more_has_no_rows(documents: Documents) -> None:
    begin(documents)
    documents.join("1", 1, result_of(1))
    assert documents.store.part("1", 1) is None
    assert documents.store.part("1", 0) is not None
    assert documents.store.part("1", 9) is None
    assert documents.store.part("another", 0) is None
    documents.fail("1", ValueError("no"))
    assert documents.store.part("1", 0) is None


# It is joined.


@pytest.mark.parametrize("seed", range(4))
def test_results_are_in_order_whenever_they_came(documents: Documents, seed: int) -> None:
    begin(documents, 1, *[1] * 12)
    order = list(range(12))
    random.Random(seed).shuffle(order)
    for index in order:
        assert documents.store.ended("1") is None
        documents.join("1", index, result_of(index))
    found = documents.store.ended("1")
    assert found is not None
    assert [float(one["rows"][0, 0]) for one in found.results] == list(range(12))
    assert {one["device"] for one in found.results} == {"gpu0"}
    assert found.call == Call(**{name: getattr(CALL, name) for name in CALL.__slots__} | {"texts": []})
    assert found.layout == new_document(*[1] * 12).layout
    assert (found.model, found.space, found.error) == ("model", "space:2", None)


def test_a_part_counts_once_and_its_first_vectors_stay(
    client: redis.Redis, documents: Documents
) -> None:
    begin(documents)
    forget_sent(client)
    documents.join("1", 0, result_of(0, by="first"))
    for again in range(3):
        documents.join("1", 0, result_of(7, by=f"again {again}"))
        documents.join("1", 0, None)
    documents.join("1", 1, result_of(1))
    assert documents.store.ended("1") is None
    assert sent_to(client) == []
    documents.join("1", 2, result_of(2))
    found = documents.store.ended("1")
    assert found is not None
    assert [one["device"] for one in found.results] == ["first", "gpu0", "gpu0"]


@pytest.mark.parametrize("priority", [0, 3, 9])
def test_a_complete_document_is_the_next_that_is_taken_of_its_priority(
    client: redis.Redis, documents: Documents, priority: int
) -> None:
    begin(documents, 1, 1, 1, priority=priority)
    begin(documents, 2, 1, priority=priority)
    for index in range(2):
        documents.join("1", index, result_of(index))
    assert sent_to(client) == ["1", "1:0", "1:1", "2:0"]
    assert client.llen(lane(keys.EMBED_QUEUE, priority)) == 4
    headers = json.loads(waiting(client, keys.EMBED_QUEUE)[0])["headers"]
    assert headers["task"] == keys.COMBINE_TASK


def test_only_one_of_many_that_end_at_once_sends_the_body(
    client: redis.Redis, results_url: str, url: str, documents: Documents
) -> None:
    begin(documents, 1, *[1] * 40)
    forget_sent(client)
    start = threading.Barrier(8)

    def run(device: int) -> None:
        with redis.Redis.from_url(url) as one, redis.Redis.from_url(results_url) as other:
            own = documents_on(one, other)
            start.wait()
            # Each part runs twice: a document delivered twice has all of them sent again.
            for index in (*range(device % 4, 40, 4), *range(device % 4, 40, 4)):
                own.join("1", index, result_of(index) if own.store.part("1", index) else None)

    threads = [threading.Thread(target=run, args=(device,)) for device in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sent_to(client) == ["1"]


def test_parts_that_end_later_send_no_second_body(client: redis.Redis, documents: Documents) -> None:
    begin(documents)
    forget_sent(client)
    for index in (0, 2, 1):
        documents.join("1", index, result_of(index))
    for index in (0, 2, 0):
        documents.join("1", index, result_of(index))
        documents.join("1", index, None)
    assert sent_to(client) == ["1"]


def test_a_body_that_could_not_be_sent_is_sent_when_its_part_is_delivered_again(
    client: redis.Redis, documents: Documents, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(documents)
    forget_sent(client)
    documents.join("1", 0, result_of(0))
    documents.join("1", 1, result_of(1))
    with monkeypatch.context() as patch:
        patch.setattr(Sender, "send_body", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            documents.join("1", 2, result_of(2))
    assert sent_to(client) == []
    assert documents.store.part("1", 2) is None
    documents.join("1", 2, None)
    documents.join("1", 2, None)
    documents.join("1", 1, None)
    assert sent_to(client) == ["1"]


def test_a_part_of_no_document_joins_nothing(
    client: redis.Redis, results: redis.Redis, documents: Documents
) -> None:
    documents.join("never", 0, result_of(0))
    documents.fail("never", ValueError("no"))
    assert sent_to(client) == []
    assert results.keys() == []
    assert documents.store.ended("never") is None


# It fails.


@pytest.mark.parametrize(
    "error",
    [
        EncodingError("gpu0", 3, "out of memory"),
        PoisonMessageError(3, "workers died"),
        TaskRevokedError("expired"),
        ValueError("plain"),
    ],
)
def test_the_first_error_is_the_documents_own(
    client: redis.Redis, documents: Documents, error: Exception
) -> None:
    begin(documents)
    forget_sent(client)
    documents.join("1", 2, result_of(2))
    documents.fail("1", error)
    documents.fail("1", KeyError("second"))
    documents.join("1", 2, None)
    documents.join("1", 0, result_of(0))
    assert sent_to(client) == ["1"]
    found = documents.store.ended("1")
    assert found is not None
    assert type(found.error) is type(error)
    assert found.error.args == error.args
    assert found.results == []


def test_a_failure_that_could_not_be_told_is_told_when_its_part_is_delivered_again(
    client: redis.Redis, documents: Documents, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(documents)
    forget_sent(client)
    with monkeypatch.context() as patch:
        patch.setattr(Sender, "send_body", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            documents.fail("1", ValueError("no"))
    assert documents.store.part("1", 1) is None
    documents.join("1", 1, None)
    assert sent_to(client) == ["1"]


def test_a_finished_document_leaves_nothing(
    client: redis.Redis, results: redis.Redis, documents: Documents
) -> None:
    begin(documents, 1)
    begin(documents, 2)
    documents.store.delete("1")
    assert kept(results) == {keys.document("2"), keys.documents()}
    assert results.zrange(keys.documents(), 0, -1) == [b"2"]
    documents.store.delete("2")
    documents.store.delete("2")
    assert kept(results) == set()
    assert documents.store.ended("1") is None


# A full server.


def test_a_full_server_takes_no_document(
    client: redis.Redis, results: redis.Redis, documents: Documents
) -> None:
    with full_memory(client), pytest.raises(redis.ResponseError, match="maxmemory"):
        begin(documents)
    assert results.keys() == []
    assert sent_to(client) == []
    begin(documents)
    assert sent_to(client) == ["1:0", "1:1", "1:2"]


def test_what_is_computed_is_taken_by_a_full_server(
    client: redis.Redis, documents: Documents, caller: Celery
) -> None:
    begin(documents)
    forget_sent(client)
    with full_memory(client):
        documents.join("1", 0, result_of(0))
        documents.join("1", 1, result_of(1))
        assert documents.store.part("1", 2) is not None
        with pytest.raises(redis.ResponseError):  # the part goes back, and comes again
            documents.join("1", 2, result_of(2))
        assert documents.store.part("1", 2) is None
    assert caller.AsyncResult("1").info == {"done": 2, "of": 3}
    assert sent_to(client) == []
    documents.join("1", 2, None)
    assert sent_to(client) == ["1"]


def test_a_full_server_gives_up_and_forgets(
    client: redis.Redis, results: redis.Redis, documents: Documents
) -> None:
    begin(documents)
    forget_sent(client)
    with full_memory(client):
        with pytest.raises(redis.ResponseError):
            documents.fail("1", ValueError("no"))
        assert documents.store.part("1", 1) is None
        found = documents.store.ended("1")
        assert found is not None
        assert isinstance(found.error, ValueError)
        documents.store.delete("1")
    assert kept(results) == set()


# The loads of devices.


def settled(client: redis.Redis, *devices: str) -> bool:
    loads = [load(client, device) for device in devices]
    assert all(loads)
    return all(
        one["messages"] == one["credit"] == 0 and one["tokens_dispatched"] == one["tokens_completed"]
        for one in loads
    )


def test_parts_that_are_done_leave_no_load(client: redis.Redis, documents: Documents) -> None:
    begin(documents, 1, 2, 1, 30, devices=["g0", "g1", "g0"])
    for device in ("g0", "g1"):
        worker = Worker(client, device)
        for raw in worker.take():
            assert weight_of(json.loads(raw)) > 0
            worker.acknowledge(raw)
        assert not settled(client, device)
        worker.send_pending()
    assert settled(client, "g0", "g1")


@pytest.mark.parametrize("resent", [False, True])
def test_parts_of_a_device_that_is_gone_end_as_the_load_of_another(
    client: redis.Redis,
    results: redis.Redis,
    documents: Documents,
    resent: bool,
) -> None:
    begin(documents, 1, 2, 1, 30, devices=["g0", "g0", "g0"])
    client.zadd(keys.queues(), {"g0": 1})
    assert requeue_waiting(client, "g0") == 3
    assert settled(client, "g0")
    if resent:
        make_overdue(results, "1")
        resend_overdue(documents)
    router, other = Worker(client), Worker(client, "g1")
    taken = router.take()
    assert len(taken) == (6 if resent else 3)
    for raw in taken:
        router.forward(raw, "g1")
    router.send_pending()
    assert load(client, "g1")["tokens_dispatched"] == (6600 if resent else 3300)
    for raw in other.take():
        other.acknowledge(raw)
    other.send_pending()
    assert settled(client, "g0", "g1")
