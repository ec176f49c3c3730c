"""Long texts on a fleet: each completes once and with the vectors of one device, or fails clearly."""

import base64
import json
import os
import signal
from collections import Counter
from typing import Any

import numpy as np
import psutil
import pytest
from celery import chain, chord
from celery.exceptions import ChordError, TaskRevokedError

from sutra_tasks import (
    Embeddings,
    EncodingError,
    IncompleteDocumentError,
    PoisonMessageError,
    embed,
    keys,
)
from sutra_tasks.app import app
from sutra_tasks.broker.dead_letters import dead_letters, drop
from sutra_tasks.chunking.answer import answer
from sutra_tasks.chunking.chunked_call import CallChunker
from sutra_tasks.client.call import Call
from sutra_tasks.engines.simulated_engine import SimulatedEncoder, vectors_of
from sutra_tasks.settings import METHODS, Settings
from tests.conftest import wait_until
from tests.system.faulty_device import COMPUTED
from tests.system.local_fleet import frozen

WIDTH = 384
SHAPE: dict[str, Any] = {"sequence_threshold": 32, "block_size": 32, "overlap_tokens": 6}
STEP = 32 - 2 - 6
"""Words from the start of a chunk to that of the next."""

LONG: dict[str, Any] = {**SHAPE, "fanout_chunks": 4, "batch_tokens": 64}
SLOW: dict[str, Any] = {**LONG, "simulated_fixed_s": 0.1}
"""Two chunks in 0.1 s: what makes a document of 60 last a second on three devices."""

LEAST_COSINE = 0.99999
CALLBACKS = "callbacks"
COUNT = app.signature("host.count").set(queue=CALLBACKS)
FAILED = app.signature("host.failed").set(queue=CALLBACKS)


def document(chunks, name="w"):
    """Return a text of so many chunks."""
    return " ".join(f"{name}{n}" for n in range(STEP * chunks + 6))


def ordered(text, chunk, order):
    """Return ``text`` with an order to the device at the beginning of one chunk."""
    words = text.split()
    words[STEP * chunk] = order
    return " ".join(words)


def expected(texts, options=LONG, **asked):
    """Compute the answer without a fleet, in one piece."""
    call = Call.of((texts,), asked, Settings())
    chunked = CallChunker(SimulatedEncoder(width=WIDTH), Settings(**options)).chunk(call)
    rows = vectors_of([row.content for row in chunked.rows], WIDTH)
    facts: dict[str, Any] = {
        "model": "simulated",
        "space": f"simulated-1:{WIDTH}",
        "device": "",
        "queue_s": 0,
    }
    return answer(call, chunked.layout, rows, **facts, compute_s=0)


def chunks_of(text):
    return [text[slice(*span)] for span in expected(text, details=True).spans[0]]


def same(got, wanted):
    """Say whether vectors are the same, in direction and in length."""
    got, wanted = np.atleast_2d(got).astype(float), np.atleast_2d(wanted).astype(float)
    if got.shape != wanted.shape:
        return False
    norms = np.linalg.norm(got, axis=1) * np.linalg.norm(wanted, axis=1)
    return ((got * wanted).sum(axis=1) / norms).min() >= LEAST_COSINE and np.allclose(
        got, wanted, atol=1e-5
    )


def await_rest(fleet, client):
    """Wait until the fleet has no message and no document."""
    wait_until(fleet.is_empty)
    wait_until(lambda: not list(client.scan_iter(f"{keys.document('')}*")))
    assert not client.exists(keys.documents())


def await_progress(result, done=1):
    """Wait until so many parts are done and not all, and return the progress."""
    seen = []

    def look():
        seen.append(result.info)
        return isinstance(seen[-1], dict) and seen[-1]["done"] >= done

    wait_until(look)
    return seen[-1]


def called_back(client):
    """Take the callbacks that were sent, and return their names and messages."""
    messages = [json.loads(raw) for raw in client.lrange(CALLBACKS, 0, -1)]
    client.delete(CALLBACKS)
    return Counter(message["headers"]["task"] for message in messages), messages


def arguments(message):
    return json.loads(base64.b64decode(message["body"]))[0]


def raw_of(client, task_id):
    """Return the message of a task that waits for a router, or that a router has in flight."""
    names = [keys.EMBED_QUEUE, *client.scan_iter(f"{keys.in_flight('')}*")]
    (found,) = {raw for name in names for raw in client.lrange(name, 0, -1) if task_id.encode() in raw}
    return found


@pytest.fixture
def faults(tmp_path):
    folder = tmp_path / "faults"
    folder.mkdir()
    return folder


# The same vectors, however many devices there are.


def test_a_document_has_the_same_vector_on_many_devices_and_on_one(start_fleet, client):
    texts = [document(1, "brief"), document(9, "a"), "short", document(17, "b"), "", document(2, "c")]
    calls: list[dict[str, Any]] = [
        *({"aggregation_method": method} for method in METHODS),
        {"normalize": False, "dimensions": 100},
        {"details": True, "chunk_vectors": True},
        {"details": True, "chunk_vectors": True, "dimensions": 64, "normalize": False},
        {"details": True, "truncate": True},
    ]
    answers = {}
    for devices, fanout_chunks in ((3, 4), (1, 10**6)):
        chosen = {"fanout_chunks": fanout_chunks, "strategy": "round_robin"}
        with start_fleet(devices, **LONG | chosen) as fleet:
            sent = [embed.delay(texts, **asked) for asked in calls]
            single = embed.delay(texts[3], details=True)
            answers[devices] = [one.get(timeout=30) for one in (*sent, single)]
            await_rest(fleet, client)
    for asked, many, one in zip([*calls, {"details": True}], answers[3], answers[1], strict=True):
        of = texts[3] if asked == {"details": True} else texts
        wanted = expected(of, **asked)
        if not asked.get("details"):
            assert same(many, one)
            assert same(many, wanted)
            continue
        assert isinstance(many, Embeddings)
        assert same(many.vectors, one.vectors)
        assert same(many.vectors, wanted.vectors)
        for fact in ("space", "tokens", "chunks", "truncated", "spans", "weights"):
            assert getattr(many, fact) == getattr(one, fact) == getattr(wanted, fact)
        if asked.get("chunk_vectors"):
            assert same(many.chunk_vectors, one.chunk_vectors)
            assert same(many.chunk_vectors, wanted.chunk_vectors)
    plain = vectors_of(["short"], WIDTH)[0]
    assert np.allclose(answers[3][0][2], plain, atol=1e-6)
    # It was computed by several devices, and each span is a slice of its text.
    single = answers[3][-1]
    assert len(single.device.split(",")) > 1
    assert single.vectors.shape == (WIDTH,)
    assert "," not in answers[1][-1].device
    assert [texts[3][slice(*span)] for span in single.spans[0]] == chunks_of(texts[3])


# Outcomes and callbacks, once each.


def test_progress_is_seen_and_documents_do_not_mix(start_fleet, client):
    with start_fleet(2, **SLOW) as fleet:
        for chunks, is_spread in ((3, False), (4, True)):
            result = embed.delay([document(chunks), "short"])
            kept = keys.document(result.id)
            wait_until(lambda: client.exists(kept) or result.ready())  # noqa: B023
            assert client.exists(kept) == is_spread
            assert same(result.get(timeout=30), expected([document(chunks), "short"]))
            await_rest(fleet, client)

        texts = [document(30, "a"), [document(20, "b"), "short", document(20, "c")]]
        results = [embed.delay(texts[0]), embed.apply_async((texts[1],), countdown=0.2, priority=3)]
        quick = embed.delay("quick")
        seen = await_progress(results[0])
        assert 0 < seen["done"] < seen["of"] <= 30
        await_progress(results[1])
        assert quick.get(timeout=20).shape == (WIDTH,)
        for result, text in zip(results, texts, strict=True):
            assert same(result.get(timeout=30), expected(text))
            assert result.state == "SUCCESS"
        await_rest(fleet, client)
        assert client.ttl(keys.result(results[0].id)) > 0
        assert len(list(client.scan_iter("celery-task-meta-*"))) == 5  # none of parts


def test_callbacks_chains_and_chords_around_a_document_work_once(start_fleet, client):
    with start_fleet(3, **LONG) as fleet:
        text = document(24)
        wanted = expected(text)

        embed.apply_async((text,), link=COUNT, link_error=FAILED).get(timeout=30)
        await_rest(fleet, client)
        counted, messages = called_back(client)
        assert counted == {"host.count": 1}
        data = arguments(messages[0])[0]["__value__"]["data"]
        assert same(np.frombuffer(base64.b64decode(data), "<f4"), wanted)

        chain(embed.s(text), app.signature("host.next").set(queue=CALLBACKS)).apply_async()
        wait_until(lambda: client.llen(CALLBACKS))
        await_rest(fleet, client)
        assert called_back(client)[0] == {"host.next": 1}

        stack = app.signature("host.stack").set(queue=CALLBACKS)
        chord([embed.s(text), embed.s("short"), embed.s([document(9), "b"])], stack).apply_async()
        wait_until(lambda: client.llen(CALLBACKS))
        await_rest(fleet, client)
        counted, messages = called_back(client)
        assert counted == {"host.stack": 1}
        shapes = [one["__value__"]["shape"] for one in arguments(messages[0])[0]]
        assert shapes == [[WIDTH], [WIDTH], [2, WIDTH]]


# Parts that fail, and callers that give up.


def test_a_part_that_fails_is_the_callers_error_with_the_position_of_its_text(
    start_fleet, client, faults
):
    with start_fleet(2, faults=faults, **LONG) as fleet:
        good = document(20)
        bad = ordered(ordered(document(40, "x"), 11, "!raise"), 33, "!raise")
        result = embed.apply_async((["short", good, bad],), link=COUNT, link_error=FAILED)
        beside = embed.delay([good, good])
        with pytest.raises(EncodingError) as failed:
            result.get(timeout=30)
        assert failed.value.position == 2
        assert failed.value.device in fleet.device_ids
        assert failed.value.reason == "ValueError"
        assert result.state == "FAILURE"
        assert same(beside.get(timeout=30), expected([good, good]))
        await_rest(fleet, client)
        assert called_back(client)[0] == {"host.failed": 1}

        for chunk in range(40):
            bad = ordered(bad, chunk, "!raise")
        for _ in range(5):  # many parts of one batch fail at once
            with pytest.raises(EncodingError):
                embed.apply_async((bad,), link_error=FAILED).get(timeout=30)
        await_rest(fleet, client)
        assert called_back(client)[0] == {"host.failed": 5}
        assert "ChordError" not in fleet.log.read_text()


def test_a_part_that_ends_its_devices_fails_its_document_and_is_kept(start_fleet, client, faults):
    with start_fleet(2, faults=faults, max_attempts=2, **LONG) as fleet:
        result = embed.apply_async((ordered(document(12), 5, "!die"),), link_error=FAILED)
        with pytest.raises(PoisonMessageError):
            result.get(timeout=60)
        letters = dead_letters(client)
        assert [one.task_id.partition(":")[0] for one in letters] == [result.id]
        drop(client, letters)
        await_rest(fleet, client)
        assert called_back(client)[0] == {"host.failed": 1}


def test_a_document_that_expires_or_is_revoked_is_computed_no_further(start_fleet, client, faults):
    """Its caller gets the state, and the devices are free for other calls."""
    with start_fleet(2, faults=faults, **SLOW) as fleet:

        def computed_chunks(text):
            return len(set((faults / COMPUTED).read_text().splitlines()) & set(chunks_of(text)))

        late = document(300, "late")  # 7 s
        expired = embed.apply_async((late,), expires=1.5)
        await_progress(expired)
        with pytest.raises(TaskRevokedError):
            expired.get(timeout=30)
        assert expired.state == "REVOKED"
        await_rest(fleet, client)
        assert embed.delay("free again").get(timeout=5).shape == (WIDTH,)
        assert 1 <= computed_chunks(late) < 250

        unwanted = document(60, "unwanted")
        revoked = embed.apply_async((unwanted,), link=COUNT)
        await_progress(revoked, done=2)
        revoked.revoke()
        with pytest.raises(TaskRevokedError):
            revoked.get(timeout=10)
        assert revoked.state == "REVOKED"
        await_rest(fleet, client)
        assert embed.delay("free again").get(timeout=5).shape == (WIDTH,)
        assert 2 <= computed_chunks(unwanted) < 40
        assert called_back(client)[0] == {}
        assert (expired.state, revoked.state) == ("REVOKED", "REVOKED")


def test_a_document_that_is_lost_midway_is_told_to_whoever_waits(start_fleet, client):
    with start_fleet(2, **SLOW) as fleet:
        lost = embed.apply_async((document(60),), link_error=FAILED)
        of = await_progress(lost)["of"]
        client.delete(keys.document(lost.id))
        with pytest.raises(IncompleteDocumentError) as told:
            lost.get(timeout=30)
        assert told.value.args == (of, of, 0.0)
        await_rest(fleet, client)
        assert called_back(client)[0] == {"host.failed": 1}

        joined = chord([embed.s(document(60)), embed.s("short")], COUNT).apply_async()
        long = joined.parent.results[0]
        await_progress(long)
        client.delete(keys.document(long.id))
        with pytest.raises(ChordError):
            joined.get(timeout=30, follow_parents=False)
        await_rest(fleet, client)
        assert called_back(client)[0] == {}
        assert embed.delay("unharmed").get(timeout=10).shape == (WIDTH,)


def test_a_call_that_is_terminated_is_revoked_and_no_worker_is_harmed(start_fleet, client):
    with start_fleet(2, **SLOW) as fleet:
        pids = [fleet.pid(name) for name in [*fleet.device_ids, *fleet.router_names]]
        calls = [embed.delay(document(200)), embed.delay(["w " * 20] * 1000)]  # half a minute and more
        await_progress(calls[0])
        for call in calls:
            call.revoke(terminate=True)
            with pytest.raises(TaskRevokedError):
                call.get(timeout=10)
        embed.delay("not running").revoke(terminate=True, signal="SIGKILL")
        await_rest(fleet, client)
        assert embed.delay("unharmed").get(timeout=10).shape == (WIDTH,)
        assert [fleet.pid(name) for name in [*fleet.device_ids, *fleet.router_names]] == pids
        assert "Traceback" not in fleet.log.read_text()


# Devices that die, messages that are delivered twice or lost.


def test_a_device_that_dies_midway_costs_no_document_anything(start_fleet, client):
    with start_fleet(3, **SLOW) as fleet:
        texts = [document(60, name) for name in "ab"]
        results = [embed.apply_async((text,), link=COUNT) for text in texts]
        await_progress(results[0])
        victim = fleet.device_ids[0]
        pid = fleet.pid(victim)
        with frozen(pid):
            assert fleet.device(victim).held
            os.kill(pid, signal.SIGKILL)
        for text, result in zip(texts, results, strict=True):
            assert same(result.get(timeout=30), expected(text))
        await_rest(fleet, client)
        assert called_back(client)[0] == {"host.count": 2}


def test_a_document_that_is_delivered_twice_completes_once(start_fleet, client):
    with start_fleet(3, **SLOW) as fleet:
        text = document(40)
        with frozen(*map(fleet.pid, fleet.router_names)):
            result = embed.apply_async((text,), link=COUNT)
            raw = raw_of(client, result.id)
            client.lpush(keys.EMBED_QUEUE, raw)
        assert same(result.get(timeout=30), expected(text))
        await_rest(fleet, client)
        assert called_back(client)[0] == {"host.count": 1}

        # Delivered again after its outcome is stored: it may be computed again, but the outcome stays.
        client.lpush(keys.EMBED_QUEUE, raw)
        wait_until(lambda: client.exists(keys.document(result.id)))
        while client.exists(keys.document(result.id)):
            stored = json.loads(client.get(keys.result(result.id)))
            assert stored["status"] == "SUCCESS"
        await_rest(fleet, client)
        assert same(app.AsyncResult(result.id).get(timeout=5), expected(text))
        called_back(client)


def test_parts_that_are_lost_are_sent_again(start_fleet, client):
    with start_fleet(2, overdue_s=1, **SLOW) as fleet:
        text = document(60)
        one, other = fleet.device_ids
        queue = keys.device_queue(other)
        with frozen(fleet.pid(other)):
            result = embed.apply_async((text,), link=COUNT, queue=keys.device_queue(one))
            wait_until(lambda: client.llen(queue) > 1)
            await_progress(result)
            assert client.delete(queue)
        assert same(result.get(timeout=30), expected(text))
        await_rest(fleet, client)
        assert called_back(client)[0] == {"host.count": 1}
        assert "overdue parts are sent again" in fleet.log.read_text()


# A book.


def test_a_text_of_five_megabytes_fits_the_memory_of_every_worker(start_fleet, client):
    count = 5_000_000 // 6
    text = " ".join(f"{n % 99_991:05d}" for n in range(count))
    assert len(text) >= 4_999_000
    with start_fleet(2, simulated_per_token_s=2e-6) as fleet:
        embed.delay([document(9), "warm"]).get(timeout=20)
        processes = [
            psutil.Process(fleet.pid(name)) for name in (*fleet.router_names, *fleet.device_ids)
        ]
        before = [process.memory_info().rss for process in processes]
        grown = [0] * len(processes)

        def look():
            for at, process in enumerate(processes):
                grown[at] = max(grown[at], process.memory_info().rss - before[at])

        def seen(condition):
            look()
            return condition()

        result = embed.delay(text, details=True)
        wait_until(lambda: seen(lambda: result.state == "PROGRESS"), within_s=30)
        wait_until(lambda: seen(result.ready), within_s=30)
        got = result.get(timeout=5)
        wanted = expected(text, options={}, details=True)
        assert got.chunks == wanted.chunks
        assert got.chunks[0] > 1500
        assert got.spans == wanted.spans
        assert same(got.vectors, wanted.vectors)
        assert max(grown) < 400 << 20, [size >> 20 for size in grown]
        await_rest(fleet, client)

        cancelled = embed.delay(text)
        await_progress(cancelled)
        cancelled.revoke()
        with pytest.raises(TaskRevokedError):
            cancelled.get(timeout=20)
        await_rest(fleet, client)
