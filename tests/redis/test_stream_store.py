"""Streams on a real server: nothing is lost, mixed up or written twice, whoever reads and dies."""

from __future__ import annotations

import json
import random
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import pytest
import redis

from sutra_tasks import keys
from sutra_tasks.streaming import store
from sutra_tasks.streaming.backpressure import Level
from sutra_tasks.streaming.chunker import Progress
from sutra_tasks.streaming.scripts import GROUP
from sutra_tasks.streaming.store import OpenText, RawEntry, Server, Stored, StreamState
from tests.conftest import wait_until
from tests.redis.peers import full_memory

S = "s"
IN, CLOSED, OUT, DEAD, TEXTS, READY, BUFFERED, STATE = (
    keys.stream(S, part)
    for part in ("in", "closed", "out", "dead", "texts", "ready", "buffered", "state")
)
RESPONSE = ["v", 1, "kind", "response"]
ERROR = ["v", "1", "kind", "error", "ids", '["a"]', "error", "EncodingError", "message", "no"]
FIRST_NEED = 8


@pytest.fixture(autouse=True)
def _swept(_nothing_is_left_behind: None, client: redis.Redis) -> Iterator[None]:
    """Only entries, responses and dead letters last: nothing else of any text is left by any test."""
    yield
    client.delete(IN, OUT, DEAD)


@pytest.fixture
def a(client: redis.Redis) -> Server:
    return Server(client, "a")


@pytest.fixture
def b(client: redis.Redis) -> Server:
    return Server(client, "b")


def add(client: redis.Redis, **fields: Any) -> bytes:
    """Add an entry as any client would; ``end`` is a name of a field as any other."""
    given: Any = fields
    entry_id: Any = client.xadd(IN, given)
    return bytes(entry_id)


def read(server: Server, most: int = 100, *, most_unread: int = 1000) -> list[RawEntry]:
    return list(server.read(S, most, first_need=FIRST_NEED, most_unread=most_unread).entries)


def take(
    server: Server, most: int = 100, *, lease_s: float = 60, most_bytes: int = 10**6
) -> list[OpenText]:
    return server.take(S, most, lease_s=lease_s, most_bytes=most_bytes)


def take_one(server: Server, **options: Any) -> OpenText:
    (text,) = take(server, **options)
    return text


def cut(
    server: Server, text: OpenText, done: int | None = None, *, how: str | None = None, need: int = 1
) -> Stored:
    """Commit the first ``done`` bytes of a text as one chunk; all of it if nothing is said."""
    done = len(text.buffer) if done is None else done
    words = text.buffer[:done].decode()
    at = text.progress.position + len(words)
    if how is None:
        how = {"end": "last", "abandoned": "last", "idle": "idle"}.get(text.ending or "", "more")
    number = text.progress.number
    response = ["key", text.key, "source", text.source, "number", number, "text", words]
    progress = Progress(at, number + 1, at)
    return server.commit_text(
        S, text, done_bytes=done, progress=progress, need=need, how=how, response=response
    )


def expire(client: redis.Redis) -> None:
    """Let the leases of texts be over."""
    named: Any = client.zrange(READY, 0, -1)
    client.zadd(READY, dict.fromkeys(named, 0), xx=True)


def silence(client: redis.Redis, consumer: str, *entry_ids: bytes) -> None:
    """Let it be a minute ago that a consumer was heard of."""
    client.xclaim(IN, GROUP, consumer, 0, list(entry_ids), idle=60_000, justid=True)


def pending(client: redis.Redis) -> dict[bytes, tuple[str, int]]:
    """Return who has which entry, and how often it was delivered."""
    found: Any = client.xpending_range(IN, GROUP, "-", "+", 1000)
    return {one["message_id"]: (one["consumer"].decode(), one["times_delivered"]) for one in found}


def written(client: redis.Redis, name: str = OUT) -> list[dict[bytes, bytes]]:
    """Return what stands in the output, or in another stream."""
    found: Any = client.xrange(name)
    return [fields for _, fields in found]


def texts_of(entries: Sequence[RawEntry]) -> list[bytes]:
    return [fields[fields.index(b"text") + 1] for _, fields in entries]


def whole_texts(client: redis.Redis) -> dict[bytes, bytes]:
    """Return what was written of each text, one chunk behind the other, by its source."""
    found: dict[bytes, bytes] = {}
    for fields in written(client):
        found[fields[b"source"]] = found.get(fields[b"source"], b"") + fields[b"text"]
    return found


def everything(client: redis.Redis, *servers: Server) -> None:
    """Let consumers read and commit in turn, by chance as much as they like, until nothing is left."""
    chance = random.Random(len(servers))
    while client.xlen(IN) or client.zcard(READY):
        server = chance.choice(servers)
        assert read(server, chance.randint(1, 5)) == []
        for text in take(server, chance.randint(1, 3)):
            cut(server, text)


# Entries that are texts by themselves.


def test_entries_come_in_order_and_once_whoever_reads(client: redis.Redis, a: Server, b: Server) -> None:
    for number in range(20):
        add(client, text=number)
    mine, others = read(a, 7), read(b, 7)
    assert texts_of(mine) + texts_of(others) == [b"%d" % n for n in range(14)]
    assert texts_of(read(a)) == [b"%d" % n for n in range(14, 20)]
    assert read(b) == []


def test_a_group_is_made_by_whoever_reads_first_and_begins_at_the_first_entry(
    client: redis.Redis, a: Server, b: Server
) -> None:
    assert read(a) == []
    client.delete(IN)
    add(client, text="before anybody read")
    assert texts_of(read(b)) == [b"before anybody read"]


def test_where_new_entries_will_be_is_known_when_there_are_none(client: redis.Redis, a: Server) -> None:
    entry_id = add(client, text="x")
    assert a.read(S, 1, first_need=8, most_unread=1).last is None
    last = a.read(S, 1, first_need=8, most_unread=1).last
    assert last == entry_id
    threading.Timer(0.05, add, [client], {"text": "y"}).start()
    a.await_entries({S: last}, 20)
    assert texts_of(read(a)) == [b"y"]


def test_nobody_is_read_for_while_nobody_reads_the_output(client: redis.Redis, a: Server) -> None:
    for _ in range(3):
        client.xadd(OUT, {"v": "1"})
    add(client, text="x")
    add(client, text="12345678", key="k")
    assert read(a, 1, most_unread=4) != []
    assert read(a, most_unread=4) == []
    client.xadd(OUT, {"v": "1"})
    found = a.read(S, 10, first_need=FIRST_NEED, most_unread=4)
    assert (found.entries, found.ready, found.last) == ([], 0, None)
    assert a.read(S, 10, first_need=FIRST_NEED, most_unread=5).ready == 1
    cut(a, take_one(a), how="last")


def test_output_acknowledgement_and_deletion_are_one_step(client: redis.Redis, a: Server) -> None:
    ids = [add(client, text=n) for n in range(3)]
    assert [entry_id for entry_id, _ in read(a)] == ids
    rows = [b"\x00\r\n\xff", b"\x01\x00\x00\x80", b"four"]
    before: Any = client.time()
    entries = list(zip(ids, ['{"id":"0"}', '{"id":"1"},{"id":"1b"}', '{"id":"ü"}'], rows, strict=True))
    stored = a.commit(S, RESPONSE, entries)
    assert stored.entries == 3
    assert 0 <= stored.at_ms - (1000 * before[0] + before[1] / 1000) < 10_000
    (fields,) = written(client)
    assert fields[b"vectors"] == b"".join(rows)
    assert [one["id"] for one in json.loads(fields[b"chunks"])] == ["0", "1", "1b", "ü"]
    assert (fields[b"v"], fields[b"kind"]) == (b"1", b"response")
    assert client.xlen(IN) == 0
    assert pending(client) == {}


@pytest.mark.parametrize("gone", [{0}, {1}, {2}, {0, 2}, {0, 1, 2}])
def test_what_another_has_committed_meanwhile_is_left_out_to_the_byte(
    client: redis.Redis, a: Server, b: Server, gone: set[int]
) -> None:
    ids = [add(client, text=n) for n in range(3)]
    read(a)
    for number in gone:
        silence(client, "a", ids[number])
    for _ in gone:
        ((entry_id, _),) = b.claim(S, 30).entries
        assert b.commit(S, RESPONSE, [(entry_id, '{"id":"b"}', b"b\x00")]).entries == 1
    client.delete(OUT)
    rows = [bytes([number, 255, 0]) * (number + 1) for number in range(3)]
    stored = a.commit(S, RESPONSE, [(ids[n], f'{{"id":"{n}"}}', rows[n]) for n in range(3)])
    left = [number for number in range(3) if number not in gone]
    assert stored.entries == len(left)
    if not left:
        assert written(client) == []
        return
    (fields,) = written(client)
    assert fields[b"vectors"] == b"".join(rows[n] for n in left)
    assert [one["id"] for one in json.loads(fields[b"chunks"])] == [str(n) for n in left]


def test_a_commit_whose_answer_was_lost_writes_nothing_the_second_time(
    client: redis.Redis, a: Server
) -> None:
    entry_id = add(client, text="x")
    read(a)
    assert a.commit(S, RESPONSE, [(entry_id, '{"id":"x"}', b"x")]).entries == 1
    assert a.commit(S, RESPONSE, [(entry_id, '{"id":"x"}', b"x")]).entries == 0
    assert a.commit(S, ERROR, [(entry_id, "", b"")]).entries == 0
    assert client.xlen(OUT) == 1


def test_an_error_has_neither_chunks_nor_vectors(client: redis.Redis, a: Server) -> None:
    entry_id = add(client, text="x")
    read(a)
    assert a.commit(S, ERROR, [(entry_id, "", b"")]).entries == 1
    (fields,) = written(client)
    expected = dict(zip(ERROR[::2], ERROR[1::2], strict=True))
    assert {name.decode(): value.decode() for name, value in fields.items()} == expected
    assert client.xlen(IN) == 0


# Texts that arrive in pieces.


@pytest.mark.parametrize("consumers", [1, 2, 5])
def test_a_text_is_the_same_however_many_read_its_pieces(client: redis.Redis, consumers: int) -> None:
    chance = random.Random(consumers)
    expected = {}
    for key in ("a", "b", "schlüssel ✓"):
        parts = ["".join(chance.choices("ab ü✓\n", k=chance.randint(0, 9))) for _ in range(30)]
        expected[key] = parts
    waiting = {key: list(parts) for key, parts in expected.items()}
    servers = [Server(client, str(n)) for n in range(consumers)]
    while waiting:
        key = chance.choice(list(waiting))
        text = waiting[key].pop(0)
        last = {} if waiting[key] else {"end": "1"}
        add(client, text=text, key=key, id=f"id {key}", **last)
        if not waiting[key]:
            del waiting[key]
        if chance.random() < 0.5:
            server = chance.choice(servers)
            read(server, chance.randint(1, 4))
            for text_ in take(server, 1):
                cut(server, text_, chance.choice([0, None]) if text_.ending is None else None)
    everything(client, *servers)
    got = {source.decode(): text.decode() for source, text in whole_texts(client).items()}
    assert got == {f"id {key}": "".join(parts) for key, parts in expected.items()}


@pytest.mark.parametrize("key", ["a", "schlüssel ✓", "two words", "k:0\x00", "*"])
def test_any_name_is_a_key(client: redis.Redis, a: Server, key: str) -> None:
    add(client, text="x", key=key, end="true")
    assert read(a) == []
    text = take_one(a)
    assert (text.key.decode(), text.buffer, text.ending) == (key, b"x", "end")
    assert cut(a, text).entries == 1
    assert client.zcard(READY) == 0


def test_a_text_says_what_it_is(client: redis.Redis, a: Server) -> None:
    add(client, text="grün ", key="k", id="first", prompt="query")
    entry_id = add(client, text="und blau", key="k", id="second", prompt="document")
    read(a)
    text = take_one(a)
    assert (text.source, text.prompt, text.buffer.decode()) == ("first", "query", "grün und blau")
    assert (text.attempts, text.ending, text.progress) == (1, None, Progress())
    assert text.arrived_ms == int(entry_id.partition(b"-")[0])
    cut(a, text, 6, how="more")
    add(client, key="k", end="1")
    read(a)
    text = take_one(a)
    assert (text.source, text.prompt, text.buffer) == ("first", "query", b"und blau")
    assert (text.attempts, text.ending, text.progress) == (1, "end", Progress(5, 1, 5))
    cut(a, text)


def test_a_text_without_an_id_is_named_by_its_first_entry(client: redis.Redis, a: Server) -> None:
    entry_id = add(client, text="x", key="k")
    add(client, text="y", key="k", end="1")
    read(a)
    text = take_one(a)
    assert (text.source, text.prompt) == (entry_id.decode(), None)
    cut(a, text)


def test_a_text_can_be_taken_once_there_is_enough_of_it(client: redis.Redis, a: Server) -> None:
    def ready() -> int:
        return a.read(S, 10, first_need=FIRST_NEED, most_unread=9).ready

    add(client, text="1234567", key="k")
    assert ready() == 0
    assert take(a) == []
    add(client, text="8", key="k")
    assert ready() == 1
    cut(a, take_one(a), 4, how="more", need=6)
    assert ready() == 0
    add(client, text="9", key="k")
    assert ready() == 0
    add(client, text="0", key="k")
    assert ready() == 1
    text = take_one(a)
    assert text.buffer == b"567890"
    cut(a, text, 1, how="more", need=5)  # there is enough still
    assert ready() == 1
    cut(a, take_one(a), how="last")


def test_texts_of_one_key_do_not_mix(client: redis.Redis, a: Server, b: Server) -> None:
    for number in range(4):
        add(client, text=f"{number} begins, ", key="k", id=str(number), prompt=f"p{number}")
        add(client, text=f"{number} ends", key="k", id="other", end="1")
    assert read(a, 3) == read(b, 2) == read(a) == []
    for number in range(4):
        text = take_one(b if number % 2 else a)
        assert (text.source, text.prompt, text.ending) == (str(number), f"p{number}", "end")
        assert text.buffer.decode() == f"{number} begins, {number} ends"
        assert text.progress == Progress()
        assert take(a) == []
        cut(b if number % 2 else a, text, 3, how="more")
        text = take_one(b if number % 2 else a)
        assert text.progress == Progress(3, 1, 3)
        assert cut(b if number % 2 else a, text).entries == 1
    assert take(a) == []


def test_a_text_that_begins_while_the_last_one_is_worked_on_waits_its_turn(
    client: redis.Redis, a: Server
) -> None:
    add(client, text="first", key="k", id="1", end="1")
    read(a)
    text = take_one(a)
    add(client, text="second", key="k", id="2")
    read(a)
    assert take(a) == []
    cut(a, text, need=99)
    assert take(a) == []
    add(client, text=" one", key="k", end="1")
    read(a)
    text = take_one(a)
    assert (text.source, text.buffer, text.attempts) == ("2", b"second one", 1)
    cut(a, text)


def test_a_numbered_piece_that_comes_again_is_dropped(client: redis.Redis, a: Server, b: Server) -> None:
    for seq in (0, 1, 0, 1, 1, 2, 0, 2):
        add(client, text=f"<{seq}>", key="k", seq=seq)
    assert read(a, 3) == read(b, 2) == read(a) == []
    add(client, key="k", seq=3, end="1")
    assert read(b) == []
    text = take_one(a)
    assert text.buffer == b"<0><1><2>"
    cut(a, text)
    assert (client.xlen(IN), pending(client)) == (0, {})


def test_numbers_begin_anew_with_each_text_of_a_key(client: redis.Redis, a: Server) -> None:
    for number in range(3):
        add(client, text=f"{number}a", key="k", seq=0)
        add(client, text=f"{number}b", key="k", seq=1, end="1")
    assert read(a) == []
    for number in range(3):
        text = take_one(a)
        assert text.buffer.decode() == f"{number}a{number}b"
        cut(a, text)


def test_a_piece_that_is_ahead_is_an_entry_by_itself_and_the_text_goes_on(
    client: redis.Redis, a: Server
) -> None:
    add(client, text="0", key="k", seq=0)
    ahead = add(client, text="2", key="k", seq=2)
    add(client, text="1", key="k", seq=1)
    add(client, text="!", key="k", seq=2, end="1")
    assert [entry_id for entry_id, _ in read(a)] == [ahead]
    text = take_one(a)
    assert text.buffer == b"01!"
    cut(a, text)
    assert set(pending(client)) == {ahead}


@pytest.mark.parametrize(
    "fields",
    [
        {"text": "x", "key": "k" * (store.MOST_NAME_BYTES + 1)},
        {"text": "x", "key": "k", "id": "i" * (store.MOST_NAME_BYTES + 1)},
        {"text": "x", "key": ""},
        {"key": "k"},
        {"other": "field"},
        {"text": "x", "key": "k", "seq": "1"},
        {"text": "x", "key": "k", "seq": "-1"},
        {"text": "x", "key": "k", "seq": "0.5"},
        {"text": "x", "key": "k", "seq": "nan"},
        {"text": "x", "key": "k", "seq": "first"},
        {"text": "x", "key": "k", "seq": "0x0"},
        {"text": "x", "key": "k", "seq": " 0"},
    ],
    ids=lambda fields: ",".join(f"{name}={value[:5]}" for name, value in fields.items()),
)
def test_what_can_be_no_piece_is_an_entry_by_itself_and_never_dropped(
    client: redis.Redis, a: Server, fields: dict[str, str]
) -> None:
    entry_id = add(client, **fields)
    ((found, raw),) = read(a)
    assert found == entry_id
    assert dict(zip(raw[::2], raw[1::2], strict=True)) == {
        name.encode(): value.encode() for name, value in fields.items()
    }
    assert set(pending(client)) == {entry_id}
    assert take(a) == []


def test_an_empty_number_is_none(client: redis.Redis, a: Server) -> None:
    add(client, text="x", key="k", seq="", end="1")
    assert read(a) == []
    cut(a, take_one(a))


def test_a_text_is_cut_off_in_stretches_that_are_not_too_long(client: redis.Redis, a: Server) -> None:
    add(client, text="1234567890abc", key="k", end="1")
    read(a)
    seen = []
    while texts := take(a, most_bytes=5):
        seen.append((texts[0].buffer, texts[0].ending))
        cut(a, texts[0], 4 if texts[0].ending is None else None, need=99)
    assert seen == [(b"12345", None), (b"56789", None), (b"90abc", "end")]


def test_no_more_is_read_while_texts_hold_too_much(
    client: redis.Redis, a: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "MOST_BUFFERED_BYTES", 10)
    add(client, text="1234567", key="k")
    add(client, text="890", key="other")
    add(client, text="a text by itself")
    assert read(a, 2) == []
    assert client.get(BUFFERED) == b"10"
    found = a.read(S, 10, first_need=FIRST_NEED, most_unread=9)
    assert (found.entries, found.last) == ([], None)  # nobody waits for what is there
    client.zadd(READY, {"k": 0})
    cut(a, take_one(a), 1, how="more", need=99)
    assert client.get(BUFFERED) == b"9"
    assert texts_of(read(a)) == [b"a text by itself"]
    for key in ("k", "other"):
        client.zadd(READY, {key: 0})
    for text in take(a):
        cut(a, text, how="last")


# Who has taken a text may vanish.


def test_a_text_belongs_to_one_until_its_lease_is_over(
    client: redis.Redis, a: Server, b: Server
) -> None:
    add(client, text="x", key="k", end="1")
    read(a)
    text = take_one(a, lease_s=60)
    assert take(b) == []
    now: Any = client.time()
    score: Any = client.zscore(READY, "k")
    assert 55_000 < score - 1000 * now[0] < 62_000
    expire(client)
    other = take_one(b)
    assert (other.key, other.buffer, other.attempts) == (text.key, text.buffer, 2)
    cut(b, other)


def test_what_a_vanished_consumer_had_read_and_taken_is_whole(
    client: redis.Redis, a: Server, b: Server
) -> None:
    add(client, text="0123456789", key="k", id="k")
    read(a)
    cut(a, take_one(a), 3, how="more")
    add(client, text="abc", key="k")
    read(a)
    take_one(a)
    add(client, text="def", key="k", end="1")
    read(a)
    expire(client)
    text = take_one(b)
    assert (text.buffer, text.ending, text.attempts) == (b"3456789abcdef", "end", 2)
    assert text.progress == Progress(3, 1, 3)
    cut(b, text)
    assert whole_texts(client) == {b"k": b"0123456789abcdef"}


def test_a_stale_token_commits_nothing(client: redis.Redis, a: Server, b: Server) -> None:
    add(client, text="x", key="k", end="1")
    read(a)
    stale = take_one(a)
    expire(client)
    newest = take_one(b)
    assert cut(a, stale).entries == 0
    a.bury(S, stale, ["key", "k"])
    assert (client.exists(OUT), client.exists(DEAD)) == (0, 0)
    assert cut(b, newest).entries == 1
    assert cut(a, stale).entries == 0  # the text is over
    add(client, text="y", key="k", id="new", end="1")
    read(a)
    assert cut(a, stale).entries == 0  # another has begun
    new = take_one(b)
    assert cut(a, stale).entries == 0
    assert cut(b, new).entries == 1
    assert [fields[b"text"] for fields in written(client)] == [b"x", b"y"]


@pytest.mark.parametrize("how", ["more", "idle", "last"])
def test_a_text_whose_commit_was_not_answered_is_written_once(
    client: redis.Redis, a: Server, how: str
) -> None:
    add(client, text="12345678", key="k")
    read(a)
    text = take_one(a)
    assert cut(a, text, 8, how=how).entries == 1
    assert cut(a, text, 8, how=how).entries == 0
    assert client.xlen(OUT) == 1
    if how != "last":
        assert client.get(BUFFERED) is None
        add(client, key="k", end="1")
        read(a)
        text = take_one(a)
        assert (text.buffer, text.progress.number) == (b"", 1)
        cut(a, text)


def test_a_text_is_kept_by_who_says_it_is_at_work(client: redis.Redis, a: Server, b: Server) -> None:
    add(client, text="x", key="k", end="1")
    read(a)
    text = take_one(a)
    expire(client)
    a.refresh(S, [], [text], 60)
    assert take(b) == []
    expire(client)
    other = take_one(b)
    expire(client)
    a.refresh(S, [], [text], 60)  # it is not a's any more
    last = take_one(b)
    assert (other.attempts, last.attempts) == (2, 3)
    cut(b, last)
    a.refresh(S, [], [text], 60)
    assert client.zcard(READY) == 0


def test_a_text_that_was_given_back_is_there_at_once_and_counts_as_never_taken(
    client: redis.Redis, a: Server, b: Server
) -> None:
    add(client, text="x", key="k", end="1")
    read(a)
    for _ in range(5):
        text = take_one(a)
        assert text.attempts == 1
        a.give_back(S, [], [text], 0)
        a.give_back(S, [], [text], 0)  # the answer was lost
    other = take_one(b)
    a.give_back(S, [], [text], 0)  # it is not a's any more
    assert take(a) == []
    assert other.attempts == 1
    cut(b, other)


def test_what_is_buried_is_a_dead_letter_and_the_text_goes_on_behind_it(
    client: redis.Redis, a: Server
) -> None:
    add(client, text="12345678", key="k", id="i")
    read(a)
    text = take_one(a)
    a.bury(S, text, ["key", text.key, "text", text.buffer])
    assert written(client, DEAD) == [{b"key": b"k", b"text": b"12345678"}]
    a.commit_text(S, text, done_bytes=8, progress=Progress(8, 1, 8), need=8, how="more", response=ERROR)
    add(client, text="9", key="k", end="1")
    read(a)
    text = take_one(a)
    assert (text.buffer, text.source, text.progress) == (b"9", "i", Progress(8, 1, 8))
    cut(a, text)
    assert [fields[b"kind"] for fields in written(client) if b"kind" in fields] == [b"error"]


# Texts that nobody ends.


def grew(client: redis.Redis, s_ago: float, *named: str) -> None:
    """Let texts have grown last so many seconds ago."""
    now: Any = client.time()
    client.zadd(TEXTS, dict.fromkeys(named, 1000 * (now[0] - s_ago)), xx=True)


def test_a_text_that_stands_still_is_flushed_once_and_may_go_on(client: redis.Redis, a: Server) -> None:
    add(client, text="abc", key="k")
    read(a)
    a.rest(S, 5.0)
    assert take(a) == []
    grew(client, 6, "k")
    a.rest(S, 0.0)
    assert take(a) == []  # it is not so set
    a.rest(S, 5.0)
    a.rest(S, 5.0)
    text = take_one(a)
    assert (text.buffer, text.ending) == (b"abc", "idle")
    cut(a, text, 2, how="idle", need=9)
    a.rest(S, 5.0)
    client.delete(STATE)  # nobody looked after the stream for a while
    a.rest(S, 5.0)
    assert take(a) == []
    add(client, text="d", key="k")
    read(a)
    grew(client, 5.5, "k")
    a.rest(S, 5.0)
    text = take_one(a)
    assert (text.buffer, text.ending, text.progress.number) == (b"cd", "idle", 1)
    add(client, text="e", key="k", end="1")
    read(a)
    cut(a, text, 1, how="idle", need=9)
    text = take_one(a)
    assert (text.buffer, text.ending) == (b"de", "end")
    cut(a, text)


def test_every_text_that_stands_still_is_flushed_however_many_do(client: redis.Redis, a: Server) -> None:
    keys_ = [f"{number:03}" for number in range(200)]
    for key in keys_:
        add(client, text="x", key=key)
    read(a, 1000)
    for number, key in enumerate(keys_):
        grew(client, 60 - number / 10, key)
    flushed = Counter[bytes]()
    for _ in range(10):
        a.rest(S, 5.0)
        for text in take(a, 1000):
            flushed[text.key] += 1
            cut(a, text)
    assert flushed == Counter(key.encode() for key in keys_)
    for key in keys_:
        add(client, key=key, end="1")
    read(a, 1000)
    for text in take(a, 1000):
        cut(a, text)


def test_a_text_that_nobody_goes_on_with_is_over(client: redis.Redis, a: Server) -> None:
    add(client, text="abc", key="k", seq=0)
    read(a)
    grew(client, store.ABANDONED_S - 60, "k")
    a.rest(S, 0.0)
    assert take(a) == []
    grew(client, store.ABANDONED_S + 60, "k")
    a.rest(S, 0.0)
    text = take_one(a)
    assert (text.buffer, text.ending) == (b"abc", "abandoned")
    a.rest(S, 0.0)
    cut(a, text)
    assert client.exists(TEXTS, READY, BUFFERED) == 0
    late = add(client, text="late", key="k", seq=1)
    assert [entry_id for entry_id, _ in read(a)] == [late]


def test_a_text_that_was_flushed_and_left_is_over_some_day(client: redis.Redis, a: Server) -> None:
    add(client, text="abc", key="k")
    read(a)
    grew(client, 6, "k")
    a.rest(S, 5.0)
    cut(a, take_one(a), need=9)
    grew(client, store.ABANDONED_S + 60, "k")
    a.rest(S, 5.0)
    text = take_one(a)
    assert text.ending == "abandoned"
    cut(a, text)


def test_of_too_many_open_texts_those_that_grew_least_lately_are_over(
    client: redis.Redis, a: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "MOST_OPEN_TEXTS", 3)
    for number in range(5):
        add(client, text="abc", key=number)
    read(a)
    for number in range(5):
        grew(client, 100 - number, str(number))
    a.rest(S, 0.0)
    found = take(a)
    assert {(text.key, text.ending) for text in found} == {(b"0", "abandoned"), (b"1", "abandoned")}
    for text in found:
        cut(a, text)
    a.rest(S, 0.0)
    assert take(a) == []
    for number in range(2, 5):
        add(client, key=number, end="1")
    everything(client, a)


def test_open_texts_that_hold_all_there_may_be_are_flushed_so_that_reading_goes_on(
    client: redis.Redis, a: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "MOST_BUFFERED_BYTES", 600)
    count = 200
    for number in range(count):
        add(client, text="12345", key=number, id=number)
    for number in range(count):
        add(client, text="67", key=number, end="1")

    def step() -> bool:
        read(a, 1000)
        a.rest(S, 0.0)
        for text in take(a, 1000):
            cut(a, text)
        return client.xlen(IN) == 0

    read(a, count)
    wait_until(step)
    everything(client, a)
    assert whole_texts(client) == {b"%d" % number: b"1234567" for number in range(count)}


# Consumers fall silent.


def test_what_a_consumer_fell_silent_over_comes_one_at_a_time_and_says_how_often(
    client: redis.Redis, a: Server, b: Server
) -> None:
    ids = [add(client, text=n) for n in range(3)]
    read(a)
    assert b.claim(S, 30).entries == []
    silence(client, "a", *ids)
    for deliveries in (1, 2):
        for entry_id in ids:
            claimed = b.claim(S, 30)
            assert claimed.deliveries == deliveries
            assert [one for one, _ in claimed.entries] == [entry_id]
            assert texts_of(claimed.entries) == [b"%d" % ids.index(entry_id)]
        assert b.claim(S, 30).entries == []
        silence(client, "b", *ids)
    assert pending(client) == dict.fromkeys(ids, ("b", 3))


def test_there_is_nothing_to_claim_where_nobody_read(client: redis.Redis, a: Server) -> None:
    assert a.claim(S, 0).entries == []
    add(client, text="x")
    assert a.claim(S, 0).entries == []


def test_what_was_given_back_comes_at_once_all_together_and_counts_as_never_delivered(
    client: redis.Redis, a: Server, b: Server
) -> None:
    ids = [add(client, text=n) for n in range(5)]
    read(a)
    silence(client, "a", ids[0])
    a.give_back(S, ids[1:4], [], 0)
    claimed = b.claim(S, 30)
    assert claimed.deliveries == 0
    assert [entry_id for entry_id, _ in claimed.entries] == ids[1:4]
    claimed = b.claim(S, 30)
    assert (claimed.deliveries, [entry_id for entry_id, _ in claimed.entries]) == (1, ids[:1])
    assert b.claim(S, 30).entries == []
    assert {entry_id: who for entry_id, (who, _) in pending(client).items()} == {
        **dict.fromkeys(ids[:4], "b"), ids[4]: "a"
    }  # fmt: skip


def test_what_was_delivered_before_is_given_back_with_its_count(
    client: redis.Redis, a: Server, b: Server
) -> None:
    ids = [add(client, text=n) for n in range(2)]
    read(a)
    a.give_back(S, ids, [], 2)
    claimed = b.claim(S, 30)
    assert (claimed.deliveries, len(claimed.entries)) == (2, 1)


def test_what_a_consumer_says_it_is_at_work_on_is_not_claimed(
    client: redis.Redis, a: Server, b: Server
) -> None:
    ids = [add(client, text=n) for n in range(2)]
    read(a)
    silence(client, "a", *ids)
    a.refresh(S, ids[:1], [], 60)
    claimed = b.claim(S, 30)
    assert [entry_id for entry_id, _ in claimed.entries] == ids[1:]
    assert pending(client) == {ids[0]: ("a", 1), ids[1]: ("b", 2)}


def test_what_was_claimed_away_is_neither_refreshed_nor_given_back(
    client: redis.Redis, a: Server, b: Server
) -> None:
    entry_id = add(client, text="x")
    read(a)
    silence(client, "a", entry_id)
    assert b.claim(S, 30).entries
    silence(client, "b", entry_id)
    a.refresh(S, [entry_id], [], 60)
    a.give_back(S, [entry_id], [], 0)
    assert pending(client) == {entry_id: ("b", 2)}
    assert b.claim(S, 30).deliveries == 2  # nor was b's silence broken


def test_what_is_done_is_not_brought_back(client: redis.Redis, a: Server, b: Server) -> None:
    entry_id = add(client, text="x")
    read(a)
    a.commit(S, RESPONSE, [(entry_id, '{"id":"x"}', b"x")])
    a.refresh(S, [entry_id], [], 60)
    a.give_back(S, [entry_id], [], 0)
    assert pending(client) == {}
    assert b.claim(S, 0).entries == []


def test_a_dead_letter_has_all_its_fields_and_its_reader_is_told(client: redis.Redis, a: Server) -> None:
    given = {"text": "x\x00ü", "id": "i", "priority": "7", "unknown": "kept"}
    add(client, **given)
    other = add(client, text="other")
    raw, _ = read(a)
    for _ in range(2):  # the answer to the first was lost
        a.give_up(S, raw, ["reason", "died", "deliveries", 3], ERROR)
    (letter,) = written(client, DEAD)
    expected = {**given, "reason": "died", "deliveries": "3"}
    assert {name.decode(): value.decode() for name, value in letter.items()} == expected
    (fields,) = written(client)
    assert fields[b"kind"] == b"error"
    assert (client.xlen(IN), set(pending(client))) == (1, {other})


def test_an_entry_that_somebody_deleted_is_nobodys(client: redis.Redis, a: Server, b: Server) -> None:
    ids = [add(client, text=n) for n in range(2)]
    read(a)
    silence(client, "a", *ids)
    client.xdel(IN, ids[0])
    wait_until(lambda: b.claim(S, 30).entries)
    assert pending(client) == {ids[1]: ("b", 2)}


# A stream whose producers heed nothing.


def backlog(client: redis.Redis) -> int:
    size: Any = client.xlen(IN if client.type(IN) == b"stream" else CLOSED)
    return int(size)


def close(client: redis.Redis, server: Server, capacity: int = 2) -> None:
    server.guard(S, StreamState(backlog(client), False, 0, Level.NORMAL, {}), capacity)


def reopen(server: Server, capacity: int = 2) -> None:
    server.guard(S, StreamState(0, True, 0, Level.NORMAL, {}), capacity)


def commit(server: Server, *entries: RawEntry) -> int:
    return server.commit(S, RESPONSE, [(one, '{"id":"x"}', b"x") for one, _ in entries]).entries


def test_beyond_its_hard_limit_a_stream_takes_nothing_and_loses_nothing(
    client: redis.Redis, a: Server
) -> None:
    for number in range(3):
        add(client, text=number)
    close(client, a)
    a.guard(S, StreamState(99, False, 0, Level.NORMAL, {}), 2)  # that was long ago
    add(client, text=3)
    close(client, a)
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        add(client, text="refused")
    assert b"stream s is closed: 4 entries wait" in client.get(IN)  # type: ignore[operator]
    close(client, a)
    assert client.xlen(CLOSED) == 4
    assert a.turn(S, 0.0) == StreamState(4, True, 0, Level.NORMAL, {"a": 0.0})
    found = read(a)
    assert texts_of(found) == [b"0", b"1", b"2", b"3"]
    assert commit(a, *found[:2]) == 2
    reopen(a)
    with pytest.raises(redis.ResponseError):
        add(client, text="refused")
    assert commit(a, found[2]) == 1
    reopen(a)
    add(client, text=4)
    assert set(pending(client)) == {found[3][0]}
    assert texts_of(read(a)) == [b"4"]
    assert client.exists(CLOSED) == 0


def test_all_that_is_done_to_a_stream_is_done_to_a_closed_one(
    client: redis.Redis, a: Server, b: Server
) -> None:
    ids = [add(client, text=n) for n in range(4)]
    before = read(a, 1)
    for part in range(2):
        add(client, text=f"<{part}>", key="k", seq=part, **({"end": "1"} if part else {}))
    close(client, a)
    others = read(b, 2)
    assert [one for one, _ in others] == ids[1:3]
    assert [one for one, _ in read(a)] == ids[3:]
    text = take_one(a)
    assert text.buffer == b"<0><1>"
    cut(a, text)
    a.refresh(S, [ids[0]], [], 60)
    b.give_back(S, ids[1:3], [], 0)
    claimed = a.claim(S, 30)
    assert [one for one, _ in claimed.entries] == ids[1:3]
    a.give_up(S, claimed.entries[0], ["reason", "died"], ERROR)
    assert commit(a, claimed.entries[1]) == 1
    assert client.xlen(CLOSED) == 2
    assert commit(a, *before) == 1
    reopen(a)
    assert set(pending(client)) == {ids[3]}


def test_a_closed_stream_with_nothing_to_read_is_not_waited_for(client: redis.Redis, a: Server) -> None:
    for number in range(4):
        add(client, text=number)
    found = read(a)
    close(client, a)
    empty = a.read(S, 10, first_need=8, most_unread=9)
    assert (empty.entries, empty.last) == ([], None)
    a.await_entries({S: found[-1][0]}, 0.01)  # it closed just before
    commit(a, *found)
    reopen(a)


def test_who_waits_for_an_entry_outlives_that_a_stream_is_closed_and_opened(
    url: str, client: redis.Redis, a: Server
) -> None:
    last = add(client, text=0)
    with redis.Redis.from_url(url) as other:
        waiting = threading.Thread(target=Server(other, "b").await_entries, args=({S: last}, 20))
        waiting.start()
        wait_until(lambda: client.info("clients")["blocked_clients"])
        close(client, a, 0)
        reopen(a, 10)
        add(client, text=1)
        waiting.join(10)
        assert not waiting.is_alive()
    assert texts_of(read(a)) == [b"0", b"1"]


def test_nothing_is_lost_while_a_stream_opens_and_closes(client: redis.Redis, url: str) -> None:
    accepted, done, ended = [], Counter[bytes](), threading.Event()

    def produce() -> None:
        with redis.Redis.from_url(url) as own:
            for number in range(1500):
                with suppress(redis.ResponseError):
                    own.xadd(IN, {"text": number})
                    accepted.append(b"%d" % number)
        ended.set()

    def consume(name: str) -> None:
        with redis.Redis.from_url(url) as own:
            server = Server(own, name)
            while not ended.is_set() or own.exists(CLOSED) or own.xlen(IN):
                if found := read(server, 7):
                    assert commit(server, *found) == len(found)
                    done.update(texts_of(found))
                state = server.turn(S, 0.0)
                if state is not None:
                    server.guard(S, state, 10)
                    own.delete(keys.stream(S, "ticked"))

    threads = [threading.Thread(target=consume, args=[name]) for name in "ab"]
    for thread in threads:
        thread.start()
    produce()
    for thread in threads:
        thread.join()
    assert done == Counter(accepted)
    assert 0 < len(accepted) <= 1500


# What devices say.


def test_one_device_at_a_time_looks_after_a_stream(client: redis.Redis, a: Server, b: Server) -> None:
    add(client, text="x")
    client.xadd(OUT, {"v": "1"})
    state = a.turn(S, 0.5)
    assert state == StreamState(1, False, 1, Level.NORMAL, {"a": 0.5})
    assert b.turn(S, 0.5) is None
    client.delete(keys.stream(S, "ticked"))
    b.publish(S, Level.SEVERE, Level.NORMAL, capacity=7, load=0.9, per_s=3)
    again = b.turn(S, 0.25)
    assert again is not None
    assert again.level is Level.SEVERE
    said: Any = client.hgetall(STATE)
    assert (said[b"capacity"], said[b"throttle_rate"], said[b"shed"]) == (b"7", b"0.5", b"1")
    assert 0 < client.ttl(STATE) <= keys.STATE_S
    assert client.hget(keys.stream(S, "totals"), "backpressure_events") == b"1"


def test_the_load_of_a_device_that_died_is_forgotten(client: redis.Redis, a: Server, b: Server) -> None:
    def seen() -> dict[str, float]:
        client.delete(keys.stream(S, "ticked"))
        state = a.turn(S, 0.5)
        assert state is not None
        return dict(state.loads)

    b.say_load(0.875)
    a.say_load(0.5)
    assert seen() == {"a": 0.5, "b": 0.875}
    dead: Any = client.hget(keys.STREAM_LOADS, "b")
    load, _, at_ms = dead.partition(b" ")
    client.hset(keys.STREAM_LOADS, "b", b"%s %d" % (load, int(at_ms) - 1000 * keys.STATE_S - 1))
    a.say_load(0.5)
    assert seen() == {"a": 0.5}
    assert 0 < client.ttl(keys.STREAM_LOADS) <= keys.STATE_S
    a.leave()
    assert client.exists(keys.STREAM_LOADS) == 0


# A server without memory for more.


def test_workers_make_room_on_a_full_server(client: redis.Redis, a: Server, b: Server) -> None:
    ids = [add(client, text=n) for n in range(4)]
    add(client, text="12345678", key="k")
    add(client, text="9", key="k", end="1")
    add(client, text="12345678", key="other")
    with full_memory(client):
        with pytest.raises(redis.OutOfMemoryError):
            add(client, text="x")
        found = read(a)
        assert [one for one, _ in found] == ids
        texts = take(a)
        assert len(texts) == 2
        a.refresh(S, ids, texts, 60)
        a.give_back(S, ids[:1], texts[1:], 0)
        a.bury(S, texts[0], ["key", "k"])
        assert cut(a, texts[0]).entries == 1
        assert [one for one, _ in b.claim(S, 30).entries] == ids[:1]
        a.give_up(S, found[1], ["reason", "died"], ERROR)
        assert commit(a, *found[2:]) == 2
        a.rest(S, 0.0)
        a.say_load(0.5)
        close(client, a, 0)
        reopen(a, 10)
        assert cut(b, take_one(b), how="last").entries == 1
    assert client.xlen(IN) == 1
    assert client.xlen(OUT) == 4


def test_all_that_is_there_is_seen(client: redis.Redis, a: Server) -> None:
    assert a.streams() == []
    client.sadd(keys.STREAMS, "b", "a")
    assert a.streams() == ["a", "b"]
    client.delete(keys.STREAMS)


def test_consumers_that_are_long_gone_are_forgotten_unless_they_hold_something(
    client: redis.Redis, a: Server, b: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def consumers() -> set[str]:
        found: Any = client.xinfo_consumers(IN, GROUP)
        return {one["name"].decode() for one in found}

    add(client, text="x")
    assert len(read(a)) == 1
    assert read(b) == []
    known = consumers()
    a.tidy(S)
    assert consumers() == known
    monkeypatch.setattr(keys, "FORGET_AFTER_S", -1)
    a.tidy(S)
    assert consumers() == {"a"}
