"""Texts that arrive in pieces: whoever reads them, nothing is lost, mixed up or written twice."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from sutra_tasks.streaming import store
from sutra_tasks.streaming.chunker import TextProgress
from tests.redis.streams.peers import (
    BUFFERED,
    FIRST_NEED,
    IN,
    TAKEABLE,
    Device,
    S,
    add,
    cut,
    everything,
    pending,
    read,
    take,
    take_one,
    texts_of,
    whole_texts,
)

if TYPE_CHECKING:
    import redis


@pytest.mark.parametrize("consumers", [1, 2, 5])
def test_a_text_is_the_same_for_any_number_of_devices_that_read_its_pieces(
    client: redis.Redis, consumers: int
) -> None:
    chance = random.Random(consumers)
    expected = {}
    for key in ("a", "b", "schlüssel ✓"):
        parts = ["".join(chance.choices("ab ü✓\n", k=chance.randint(0, 9))) for _ in range(30)]
        expected[key] = parts
    waiting = {key: list(parts) for key, parts in expected.items()}
    servers = [Device(client, str(n)) for n in range(consumers)]
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
def test_any_name_is_a_key(client: redis.Redis, a: Device, key: str) -> None:
    add(client, text="x", key=key, end="true")
    assert read(a) == []
    text = take_one(a)
    assert (text.key.decode(), text.buffer, text.ending) == (key, b"x", "end")
    assert cut(a, text).entries == 1
    assert client.zcard(TAKEABLE) == 0


def test_a_taken_text_has_its_id_prompt_and_progress(client: redis.Redis, a: Device) -> None:
    add(client, text="grün ", key="k", id="first", prompt="query")
    entry_id = add(client, text="und blau", key="k", id="second", prompt="document")
    read(a)
    text = take_one(a)
    assert (text.source, text.prompt, text.buffer.decode()) == ("first", "query", "grün und blau")
    assert (text.attempts, text.ending, text.progress) == (1, None, TextProgress())
    assert text.arrived_ms == int(entry_id.partition(b"-")[0])
    cut(a, text, 6, text_after="open")
    add(client, key="k", end="1")
    read(a)
    text = take_one(a)
    assert (text.source, text.prompt, text.buffer) == ("first", "query", b"und blau")
    assert (text.attempts, text.ending, text.progress) == (1, "end", TextProgress(5, 1, 5))
    cut(a, text)


def test_a_text_without_an_id_is_named_by_its_first_entry(client: redis.Redis, a: Device) -> None:
    entry_id = add(client, text="x", key="k")
    add(client, text="y", key="k", end="1")
    read(a)
    text = take_one(a)
    assert (text.source, text.prompt) == (entry_id.decode(), None)
    cut(a, text)


def test_a_text_can_be_taken_once_it_has_grown_enough(client: redis.Redis, a: Device) -> None:
    def ready() -> int:
        return a.read(S, 10, first_need=FIRST_NEED, most_unread=9).takeable_texts

    add(client, text="1234567", key="k")
    assert ready() == 0
    assert take(a) == []
    add(client, text="8", key="k")
    assert ready() == 1
    cut(a, take_one(a), 4, text_after="open", need=6)
    assert ready() == 0
    add(client, text="9", key="k")
    assert ready() == 0
    add(client, text="0", key="k")
    assert ready() == 1
    text = take_one(a)
    assert text.buffer == b"567890"
    cut(a, text, 1, text_after="open", need=5)  # there is enough still
    assert ready() == 1
    cut(a, take_one(a), text_after="ended")


def test_texts_of_one_key_do_not_mix(client: redis.Redis, a: Device, b: Device) -> None:
    for number in range(4):
        add(client, text=f"{number} begins, ", key="k", id=str(number), prompt=f"p{number}")
        add(client, text=f"{number} ends", key="k", id="other", end="1")
    assert read(a, 3) == read(b, 2) == read(a) == []
    for number in range(4):
        text = take_one(b if number % 2 else a)
        assert (text.source, text.prompt, text.ending) == (str(number), f"p{number}", "end")
        assert text.buffer.decode() == f"{number} begins, {number} ends"
        assert text.progress == TextProgress()
        assert take(a) == []
        cut(b if number % 2 else a, text, 3, text_after="open")
        text = take_one(b if number % 2 else a)
        assert text.progress == TextProgress(3, 1, 3)
        assert cut(b if number % 2 else a, text).entries == 1
    assert take(a) == []


def test_the_next_text_of_a_key_waits_until_the_one_before_is_committed(
    client: redis.Redis, a: Device
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


def test_a_numbered_piece_that_comes_again_is_dropped(client: redis.Redis, a: Device, b: Device) -> None:
    for seq in (0, 1, 0, 1, 1, 2, 0, 2):
        add(client, text=f"<{seq}>", key="k", seq=seq)
    assert read(a, 3) == read(b, 2) == read(a) == []
    add(client, key="k", seq=3, end="1")
    assert read(b) == []
    text = take_one(a)
    assert text.buffer == b"<0><1><2>"
    cut(a, text)
    assert (client.xlen(IN), pending(client)) == (0, {})


def test_numbers_begin_anew_with_each_text_of_a_key(client: redis.Redis, a: Device) -> None:
    for number in range(3):
        add(client, text=f"{number}a", key="k", seq=0)
        add(client, text=f"{number}b", key="k", seq=1, end="1")
    assert read(a) == []
    for number in range(3):
        text = take_one(a)
        assert text.buffer.decode() == f"{number}a{number}b"
        cut(a, text)


def test_a_piece_ahead_of_its_number_is_taken_as_an_entry_and_the_text_goes_on(
    client: redis.Redis, a: Device
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
def test_an_entry_that_cannot_be_a_piece_is_taken_as_an_entry_and_never_dropped(
    client: redis.Redis, a: Device, fields: dict[str, str]
) -> None:
    entry_id = add(client, **fields)
    ((found, raw),) = read(a)
    assert found == entry_id
    assert dict(zip(raw[::2], raw[1::2], strict=True)) == {
        name.encode(): value.encode() for name, value in fields.items()
    }
    assert set(pending(client)) == {entry_id}
    assert take(a) == []


def test_an_empty_number_counts_as_no_number(client: redis.Redis, a: Device) -> None:
    add(client, text="x", key="k", seq="", end="1")
    assert read(a) == []
    cut(a, take_one(a))


def test_a_long_text_is_taken_in_stretches(client: redis.Redis, a: Device) -> None:
    add(client, text="1234567890abc", key="k", end="1")
    read(a)
    seen = []
    while texts := take(a, most_bytes=5):
        seen.append((texts[0].buffer, texts[0].ending))
        cut(a, texts[0], 4 if texts[0].ending is None else None, need=99)
    assert seen == [(b"12345", None), (b"56789", None), (b"90abc", "end")]


def test_nothing_is_read_while_open_texts_have_too_many_bytes(
    client: redis.Redis, a: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "MOST_BUFFERED_BYTES", 10)
    add(client, text="1234567", key="k")
    add(client, text="890", key="other")
    add(client, text="a text by itself")
    assert read(a, 2) == []
    assert client.get(BUFFERED) == b"10"
    found = a.read(S, 10, first_need=FIRST_NEED, most_unread=9)
    assert (found.entries, found.last) == ([], None)  # nobody waits for what is there
    client.zadd(TAKEABLE, {"k": 0})
    cut(a, take_one(a), 1, text_after="open", need=99)
    assert client.get(BUFFERED) == b"9"
    assert texts_of(read(a)) == [b"a text by itself"]
    for key in ("k", "other"):
        client.zadd(TAKEABLE, {key: 0})
    for text in take(a):
        cut(a, text, text_after="ended")
