"""Leases of open texts: a device that has taken a text may vanish."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from sutra_tasks.streaming.chunker import TextProgress
from tests.redis.streams.peers import (
    BUFFERED,
    DEAD,
    ERROR,
    OUT,
    TAKEABLE,
    Device,
    S,
    add,
    cut,
    expire,
    read,
    take,
    take_one,
    whole_texts,
    written,
)

if TYPE_CHECKING:
    import redis

    from sutra_tasks.streaming.delivered import TextAfter


def test_a_text_is_taken_by_one_device_until_its_lease_ends(
    client: redis.Redis, a: Device, b: Device
) -> None:
    add(client, text="x", key="k", end="1")
    read(a)
    text = take_one(a, lease_s=60)
    assert take(b) == []
    now: Any = client.time()
    score: Any = client.zscore(TAKEABLE, "k")
    assert 55_000 < score - 1000 * now[0] < 62_000
    expire(client)
    other = take_one(b)
    assert (other.key, other.buffer, other.attempts) == (text.key, text.buffer, 2)
    cut(b, other)


def test_a_text_is_whole_when_the_device_that_had_it_vanishes(
    client: redis.Redis, a: Device, b: Device
) -> None:
    add(client, text="0123456789", key="k", id="k")
    read(a)
    cut(a, take_one(a), 3, text_after="open")
    add(client, text="abc", key="k")
    read(a)
    take_one(a)
    add(client, text="def", key="k", end="1")
    read(a)
    expire(client)
    text = take_one(b)
    assert (text.buffer, text.ending, text.attempts) == (b"3456789abcdef", "end", 2)
    assert text.progress == TextProgress(3, 1, 3)
    cut(b, text)
    assert whole_texts(client) == {b"k": b"0123456789abcdef"}


def test_a_stale_token_commits_nothing(client: redis.Redis, a: Device, b: Device) -> None:
    add(client, text="x", key="k", end="1")
    read(a)
    stale = take_one(a)
    expire(client)
    newest = take_one(b)
    assert cut(a, stale).entries == 0
    assert cut(a, stale, letter=["key", "k"]).entries == 0
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


@pytest.mark.parametrize("text_after", ["open", "idle", "ended"])
def test_a_text_whose_commit_was_not_answered_is_written_once(
    client: redis.Redis, a: Device, text_after: TextAfter
) -> None:
    add(client, text="12345678", key="k")
    read(a)
    text = take_one(a)
    assert cut(a, text, 8, text_after=text_after).entries == 1
    assert cut(a, text, 8, text_after=text_after).entries == 0
    assert client.xlen(OUT) == 1
    if text_after != "ended":
        assert client.get(BUFFERED) is None
        add(client, key="k", end="1")
        read(a)
        text = take_one(a)
        assert (text.buffer, text.progress.number) == (b"", 1)
        cut(a, text)


def test_a_refreshed_text_keeps_its_lease(client: redis.Redis, a: Device, b: Device) -> None:
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
    assert client.zcard(TAKEABLE) == 0


def test_a_requeued_text_can_be_taken_at_once_and_counts_as_never_taken(
    client: redis.Redis, a: Device, b: Device
) -> None:
    add(client, text="x", key="k", end="1")
    read(a)
    for _ in range(5):
        text = take_one(a)
        assert text.attempts == 1
        a.requeue(S, [], [text], 0)
        a.requeue(S, [], [text], 0)  # the answer was lost
    other = take_one(b)
    a.requeue(S, [], [text], 0)  # it is not a's any more
    assert take(a) == []
    assert other.attempts == 1
    cut(b, other)


def test_a_text_goes_on_behind_the_part_that_became_a_dead_letter(
    client: redis.Redis, a: Device
) -> None:
    add(client, text="12345678", key="k", id="i")
    read(a)
    text = take_one(a)
    letter = ["key", text.key, "text", text.buffer]
    for _ in range(2):  # the answer to the first was lost
        a.commit_text(
            S,
            text,
            done_bytes=8,
            progress=TextProgress(8, 1, 8),
            need=8,
            text_after="open",
            response=ERROR,
            letter=letter,
        )
    assert written(client, DEAD) == [{b"key": b"k", b"text": b"12345678"}]
    add(client, text="9", key="k", end="1")
    read(a)
    text = take_one(a)
    assert (text.buffer, text.source, text.progress) == (b"9", "i", TextProgress(8, 1, 8))
    cut(a, text)
    assert [fields[b"kind"] for fields in written(client) if b"kind" in fields] == [b"error"]
