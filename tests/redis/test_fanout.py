"""Long texts on a real server: every part counts once, and the caller is told once, whatever is lost."""

from __future__ import annotations

import json
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import redis
from celery import Celery
from celery.app.task import Context
from celery.exceptions import Ignore, TaskRevokedError

from sutra_tasks import keys
from sutra_tasks.batching.batcher import Batcher
from sutra_tasks.batching.jobs import NO_CONTEXT
from sutra_tasks.batching.next_batch import Limits
from sutra_tasks.batching.service import EmbeddingService, Prepared
from sutra_tasks.broker.load import weight_of
from sutra_tasks.broker.queues import lane, lanes
from sutra_tasks.broker.result_backend import RequeueMessage
from sutra_tasks.client.admission import Backlog
from sutra_tasks.client.call import HEADER, Call
from sutra_tasks.documents.answer import AnswerLayout, TextLayout
from sutra_tasks.engines.simulated_engine import SimulatedEncoder
from sutra_tasks.errors import EncodingError, IncompleteDocumentError, PoisonMessageError
from sutra_tasks.fanout.documents import Documents
from sutra_tasks.fanout.long_texts import LongTexts
from sutra_tasks.fanout.overdue import DOCUMENTS_AT_ONCE, MOST_RESENDS, overdue_after_s, resend_overdue
from sutra_tasks.fanout.sender import PARTS_AT_ONCE, Sender
from sutra_tasks.fanout.store import DocumentStore, NewDocument
from sutra_tasks.membership.reaper import requeue_waiting
from sutra_tasks.routing.snapshot import Device, Fleet
from sutra_tasks.settings import Settings
from sutra_tasks.vectors import Embeddings, Floats, Vectors
from tests.conftest import disconnect
from tests.redis.flow import Worker, load, message
from tests.redis.peers import absent_server, full_memory, waiting

if TYPE_CHECKING:
    from sutra_tasks.engines.encoder import TokenizedText

OVERDUE_S = 60
RESULT_TTL_S = 600
CALL = Call(texts=("not kept",), single=True, bytes=8, dimensions=2, details=True)
CALLBACKS = {"callbacks": [{"task": "host.save"}], "errbacks": None, "chain": None, "chord": None}


@pytest.fixture
def results_url(url: str) -> str:
    """A server with results of its own: another database of the one there is."""
    return url.removesuffix("/0") + "/1"


@pytest.fixture
def results(results_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(results_url) as client:
        client.flushdb()
        yield client
        lasting = {name.decode() for name in client.scan_iter() if client.ttl(name) == -1}
        client.flushdb()
        assert lasting <= {keys.DOCUMENTS}


@pytest.fixture(autouse=True)
def _swept(_nothing_is_left_behind: None, client: redis.Redis) -> Iterator[None]:
    """Queues are full when these tests end; ``sent_to`` says of what."""
    yield
    client.flushdb()


@pytest.fixture
def documents(client: redis.Redis, results: redis.Redis) -> Documents:
    return documents_on(client, results)


def documents_on(client: redis.Redis, results: redis.Redis) -> Documents:
    store = DocumentStore(results, overdue_s=OVERDUE_S, progress_ttl_s=RESULT_TTL_S)
    return Documents(store, Sender(client, None))


@pytest.fixture
def caller(results_url: str) -> Iterator[Celery]:
    app = Celery("caller", backend=results_url, set_as_current=False)
    yield app
    disconnect(app.backend)
    app.close()


def new_document(*chunks: int, devices: Sequence[str | None] | None = None) -> NewDocument:
    """Return a call of one text in as many parts, each of so many chunks of 100 tokens."""
    count = sum(chunks)
    text = TextLayout(90 * count, tuple((n, n + 2) for n in range(count)), (1 / count,) * count)
    return NewDocument(
        call=CALL,
        layout=AnswerLayout((text,), "mean"),
        model="model",
        space="space:2",
        parts=[{"texts": [[100, f"part {n}"]] * rows} for n, rows in enumerate(chunks)],
        tokens=[[100] * rows for rows in chunks],
        devices=devices or [None] * len(chunks),
    )


def begin(documents: Documents, number: int = 1, *chunks: int, priority: int = 0, **options: Any) -> str:
    """Have a document begun and return its id."""
    raw = message(number, priority=priority)
    documents.begin(raw, ([], {}, CALLBACKS), new_document(*(chunks or (2, 1, 1)), **options))
    return str(number)


def result_of(part: int, *, by: str = "gpu0") -> dict[str, Any]:
    rows = Vectors.of(np.full((1, 2), part, dtype=np.float32))
    return {"rows": rows, "device": by, "queue_s": 0.5, "compute_s": 0.25}


def sent_to(client: redis.Redis, queue: str = keys.EMBED_QUEUE) -> list[str]:
    """Return what waits in a queue, the next first: parts, and bodies under the caller's id."""
    return [json.loads(raw)["headers"]["id"] for raw in waiting(client, queue)]


def kept(results: redis.Redis) -> set[str]:
    """Return the names of what is kept of long texts, beside what their callers are told."""
    names = {name.decode() for name in results.scan_iter()}
    return {name for name in names if not name.startswith(keys.result(""))}


def forget_sent(client: redis.Redis) -> None:
    client.delete(*lanes(keys.EMBED_QUEUE))


def make_overdue(results: redis.Redis, *task_ids: str, by_s: float = 1) -> None:
    """Move when documents are overdue to so many seconds ago."""
    now: Any = results.time()
    results.zadd(keys.DOCUMENTS, dict.fromkeys(task_ids, now[0] - by_s), xx=True)


def due_in_s(results: redis.Redis, task_id: str) -> float:
    now: Any = results.time()
    at: Any = results.zscore(keys.DOCUMENTS, task_id)
    return float(at - now[0])


# It begins.


def test_a_call_becomes_a_document_and_a_message_a_part(
    client: redis.Redis, results: redis.Redis, documents: Documents
) -> None:
    begin(documents, 1, 2, 1, 1)
    assert sent_to(client) == ["1:0", "1:1", "1:2"]
    assert kept(results) == {keys.document("1"), keys.DOCUMENTS}
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
    bodies = Counter(sent_to(client))
    assert bodies.keys() == {"1"}
    # The part that sent it may have asked again: it cannot know whether it was heard.
    assert 1 <= bodies["1"] <= 4


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
    assert kept(results) == {keys.document("2"), keys.DOCUMENTS}
    assert results.zrange(keys.DOCUMENTS, 0, -1) == [b"2"]
    documents.store.delete("2")
    documents.store.delete("2")
    assert kept(results) == set()
    assert documents.store.ended("1") is None


# What the caller sees meanwhile.


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


# What is lost is found.


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
    client.set(keys.BACKLOG, Backlog(tokens=30_000, tokens_per_s=100.0).to_json(), ex=60)
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
    client.zadd(keys.QUEUES, {"g0": 1})
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


# A device's share in it, but for its threads and its engine's.

OPTIONS = Settings(sequence_threshold=32, block_size=32, overlap_tokens=6, batch_tokens=64)
TEXTS = ["short", " ".join(f"word{n}" for n in range(500)), " ".join(f"more{n}" for n in range(90))]


class Refusing(SimulatedEncoder):
    """An engine of which chunks are as long as their sum, which is nothing."""

    def encode(self, batch: Sequence[TokenizedText]) -> Floats:
        return np.zeros((len(batch), self.info.width), dtype=np.float32)


@pytest.fixture
def share(documents: Documents) -> Iterator[Callable[..., LongTexts]]:
    """``share(device, encoder)``: what a device has of long texts, computing on the caller's thread."""
    with ExitStack() as opened:

        def share_of(device: str = "g0", encoder: SimulatedEncoder | None = None) -> LongTexts:
            engine = encoder or SimulatedEncoder(width=8)
            batcher = Batcher(Limits(max_tokens=256, max_texts=8, max_wait_s=0))
            batcher.start()
            opened.callback(batcher.close, 10)
            service = EmbeddingService(engine, batcher, device, OPTIONS)
            return LongTexts(
                lambda *_: service, documents, device, OPTIONS, lambda: nullcontext(NO_CONTEXT)
            )

        yield share_of


def delivered(raw: bytes, *, weight: int = 0) -> Any:
    """Return a message as a device gets it."""
    headers = json.loads(raw)["headers"]
    return SimpleNamespace(
        headers=headers, payload=([], {}, CALLBACKS), sutra_raw=raw, sutra_weight=weight
    )


def spread(
    of: LongTexts, *devices: Device, weight: int = 0, strategy: str | None = None, **asked: Any
) -> Prepared:
    """Have a call spread whose message counts so much in its device's load."""
    prepared = of._services(None, None).prepare(Call.of([TEXTS], asked, Settings()))
    sent = delivered(message(1), weight=weight)
    sent.headers[HEADER]["strategy"] = strategy
    of.fan_out(of._services(None, None), prepared, sent, Fleet(devices))
    return prepared


def request_of(raw: bytes) -> Context:
    return Context(json.loads(raw)["headers"])


def device(name: str, **facts: Any) -> Device:
    return Device(name, keys.device_queue(name), tokens_per_s=100.0, **facts)


@pytest.mark.parametrize("asked", [{}, {"details": True, "chunk_vectors": True, "dimensions": 3}])
def test_devices_that_share_a_text_give_what_one_would(
    client: redis.Redis, documents: Documents, share: Callable[..., LongTexts], asked: dict[str, Any]
) -> None:
    workers = {name: share(name) for name in ("g0", "g1")}
    prepared = spread(workers["g0"], device("g0"), device("g1"), **asked)
    seen = set()
    for name, worker in workers.items():
        for raw in waiting(client, keys.device_queue(name)):
            request = request_of(raw)
            seen.add(name)
            documents.join(request.group, request.group_index, worker.part(request))
    assert seen == {"g0", "g1"}
    got, alone = workers["g1"].combine("1"), workers["g0"]._services(None, None).answer(prepared)
    if not asked:
        assert isinstance(got, Vectors)
        assert np.allclose(got, np.asarray(alone), atol=1e-6)
        return
    assert isinstance(got, Embeddings)
    assert isinstance(alone, Embeddings)
    assert np.allclose(got.vectors, alone.vectors, atol=1e-6)
    assert got.chunk_vectors is not None
    assert np.allclose(got.chunk_vectors, np.asarray(alone.chunk_vectors), atol=1e-6)
    assert (got.spans, got.weights, got.tokens) == (alone.spans, alone.weights, alone.tokens)
    assert got.device == "g0,g1"
    assert got.space == "simulated-1:3"
    assert got.compute_s > 0


@pytest.mark.parametrize(
    ("strategy", "weight", "expected"),
    [(None, 0, "one"), (None, 10**6, "both"), ("round_robin", 0, "both")],
)
def test_parts_go_by_the_strategy_and_the_call_itself_is_no_backlog(
    client: redis.Redis,
    share: Callable[..., LongTexts],
    strategy: str | None,
    weight: int,
    expected: str,
) -> None:
    devices = device("g0", backlog_messages=1, backlog_tokens=10**6), device("g1")
    spread(share("g0"), *devices, weight=weight, strategy=strategy)
    lengths = [client.llen(keys.device_queue(name)) for name in ("g0", "g1")]
    assert sum(lengths) >= 8
    if expected == "both":
        assert abs(lengths[0] - lengths[1]) <= 1
    else:
        assert lengths[0] == 0


def test_parts_beyond_the_credit_of_all_devices_wait_for_the_router(
    client: redis.Redis, share: Callable[..., LongTexts]
) -> None:
    spread(share("g0"), device("g0", credit_tokens=200), device("g1", credit_tokens=1))
    assert client.llen(keys.device_queue("g0")) >= 1
    assert client.llen(keys.device_queue("g1")) == 1
    assert client.llen(keys.EMBED_QUEUE) >= 2


def test_without_a_device_all_parts_wait_for_the_router(
    client: redis.Redis, share: Callable[..., LongTexts]
) -> None:
    spread(share("g0"))
    assert client.llen(keys.EMBED_QUEUE) >= 4


def test_a_part_asks_for_the_model_and_space_its_text_was_begun_with(
    client: redis.Redis, share: Callable[..., LongTexts]
) -> None:
    one = share("g0")
    spread(one, device("g0"))
    (raw, *_) = waiting(client, keys.device_queue("g0"))
    asked: list[tuple[str | None, str | None]] = []
    service = one._services(None, None)
    one._services = lambda model, space: asked.append((model, space)) or service  # type: ignore[func-returns-value]
    assert one.part(request_of(raw)) is not None
    assert asked == [("simulated", "simulated-1:8")]


def test_a_part_that_is_done_or_unwanted_is_nothing(
    client: redis.Redis, documents: Documents, share: Callable[..., LongTexts]
) -> None:
    one = share("g0")
    spread(one, device("g0"))
    first, second, *_ = map(request_of, waiting(client, keys.device_queue("g0")))
    documents.join(first.group, first.group_index, one.part(first))
    assert one.part(first) is None
    assert one.part(second) is not None
    documents.store.delete("1")
    assert one.part(second) is None
    with pytest.raises(Ignore):
        one.combine("1")


def test_chunks_without_a_direction_are_an_error_of_their_text(
    client: redis.Redis, documents: Documents, share: Callable[..., LongTexts]
) -> None:
    one = share("g0", Refusing(width=8))
    spread(one, device("g0"))
    for raw in waiting(client, keys.device_queue("g0")):
        request = request_of(raw)
        documents.join(request.group, request.group_index, one.part(request))
    with pytest.raises(EncodingError) as failed:
        one.combine("1")
    assert failed.value.position == 1


def test_an_error_is_raised_as_it_is(documents: Documents, share: Callable[..., LongTexts]) -> None:
    one = share("g0")
    spread(one, device("g0"))
    documents.fail("1", EncodingError("g7", 2, "no"))
    with pytest.raises(EncodingError) as failed:
        one.combine("1")
    assert failed.value.args == ("g7", 2, "no")


def test_a_server_that_is_away_sends_the_message_back(share: Callable[..., LongTexts]) -> None:
    one = share("g0")
    away = absent_server()
    one._documents = documents_on(away, away)
    with pytest.raises(RequeueMessage):
        spread(one, device("g0"))
    with pytest.raises(RequeueMessage):
        one.part(Context(group="1", group_index=0))
    with pytest.raises(RequeueMessage):
        one.combine("1")
