"""Texts that nobody ends are flushed, and over some day."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from sutra_tasks.streaming import store, upkeep_store
from tests.conftest import wait_until
from tests.redis.streams.peers import (
    BUFFERED,
    IN,
    STATE,
    TAKEABLE,
    TEXTS,
    Device,
    S,
    add,
    cut,
    everything,
    grew,
    read,
    take,
    take_one,
    whole_texts,
)

if TYPE_CHECKING:
    import pytest
    import redis


def test_an_idle_text_is_flushed_once_and_may_go_on(client: redis.Redis, a: Device) -> None:
    add(client, text="abc", key="k")
    read(a)
    a.flush_texts(S, 5.0)
    assert take(a) == []
    grew(client, 6, "k")
    a.flush_texts(S, 0.0)
    assert take(a) == []  # it is not so set
    a.flush_texts(S, 5.0)
    a.flush_texts(S, 5.0)
    text = take_one(a)
    assert (text.buffer, text.ending) == (b"abc", "idle")
    cut(a, text, 2, text_after="idle", need=9)
    a.flush_texts(S, 5.0)
    client.delete(STATE)  # nobody looked after the stream for a while
    a.flush_texts(S, 5.0)
    assert take(a) == []
    add(client, text="d", key="k")
    read(a)
    grew(client, 5.5, "k")
    a.flush_texts(S, 5.0)
    text = take_one(a)
    assert (text.buffer, text.ending, text.progress.number) == (b"cd", "idle", 1)
    add(client, text="e", key="k", end="1")
    read(a)
    cut(a, text, 1, text_after="idle", need=9)
    text = take_one(a)
    assert (text.buffer, text.ending) == (b"de", "end")
    cut(a, text)


def test_any_number_of_idle_texts_are_flushed(client: redis.Redis, a: Device) -> None:
    keys_ = [f"{number:03}" for number in range(200)]
    for key in keys_:
        add(client, text="x", key=key)
    read(a, 1000)
    for number, key in enumerate(keys_):
        grew(client, 60 - number / 10, key)
    flushed = Counter[bytes]()
    for _ in range(10):
        a.flush_texts(S, 5.0)
        for text in take(a, 1000):
            flushed[text.key] += 1
            cut(a, text)
    assert flushed == Counter(key.encode() for key in keys_)
    for key in keys_:
        add(client, key=key, end="1")
    read(a, 1000)
    for text in take(a, 1000):
        cut(a, text)


def test_an_abandoned_text_is_over(client: redis.Redis, a: Device) -> None:
    add(client, text="abc", key="k", seq=0)
    read(a)
    grew(client, upkeep_store.ABANDONED_S - 60, "k")
    a.flush_texts(S, 0.0)
    assert take(a) == []
    grew(client, upkeep_store.ABANDONED_S + 60, "k")
    a.flush_texts(S, 0.0)
    text = take_one(a)
    assert (text.buffer, text.ending) == (b"abc", "abandoned")
    a.flush_texts(S, 0.0)
    cut(a, text)
    assert client.exists(TEXTS, TAKEABLE, BUFFERED) == 0
    late = add(client, text="late", key="k", seq=1)
    assert [entry_id for entry_id, _ in read(a)] == [late]


def test_a_flushed_text_that_is_abandoned_is_over(client: redis.Redis, a: Device) -> None:
    add(client, text="abc", key="k")
    read(a)
    grew(client, 6, "k")
    a.flush_texts(S, 5.0)
    cut(a, take_one(a), need=9)
    grew(client, upkeep_store.ABANDONED_S + 60, "k")
    a.flush_texts(S, 5.0)
    text = take_one(a)
    assert text.ending == "abandoned"
    cut(a, text)


def test_of_too_many_open_texts_those_that_have_not_grown_for_longest_are_over(
    client: redis.Redis, a: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep_store, "MOST_OPEN_TEXTS", 3)
    for number in range(5):
        add(client, text="abc", key=number)
    read(a)
    for number in range(5):
        grew(client, 100 - number, str(number))
    a.flush_texts(S, 0.0)
    found = take(a)
    assert {(text.key, text.ending) for text in found} == {(b"0", "abandoned"), (b"1", "abandoned")}
    for text in found:
        cut(a, text)
    a.flush_texts(S, 0.0)
    assert take(a) == []
    for number in range(2, 5):
        add(client, key=number, end="1")
    everything(client, a)


def test_open_texts_are_flushed_when_they_fill_the_buffer_so_that_reading_goes_on(
    client: redis.Redis, a: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "MOST_BUFFERED_BYTES", 600)
    count = 200
    for number in range(count):
        add(client, text="12345", key=number, id=number)
    for number in range(count):
        add(client, text="67", key=number, end="1")

    def step() -> bool:
        read(a, 1000)
        a.flush_texts(S, 0.0)
        for text in take(a, 1000):
            cut(a, text)
        return client.xlen(IN) == 0

    read(a, count)
    wait_until(step)
    everything(client, a)
    assert whole_texts(client) == {b"%d" % number: b"1234567" for number in range(count)}
