"""A stream whose producers ignore backpressure is closed, loses nothing, and is opened again."""

from __future__ import annotations

import threading
from collections import Counter
from contextlib import suppress

import pytest
import redis

from sutra_tasks import keys
from sutra_tasks.streaming.backpressure import Level
from sutra_tasks.streaming.upkeep_store import StreamState
from tests.conftest import wait_until
from tests.redis.streams.peers import (
    CLOSED,
    ERROR,
    IN,
    Device,
    S,
    add,
    close,
    commit,
    cut,
    pending,
    read,
    reopen,
    take_one,
    texts_of,
)


def test_beyond_its_hard_limit_a_stream_takes_nothing_and_loses_nothing(
    client: redis.Redis, a: Device
) -> None:
    for number in range(3):
        add(client, text=number)
    close(client, a)
    a.enforce_hard_limit(S, StreamState(99, False, 0, Level.NORMAL, {}), 2)  # that was long ago
    add(client, text=3)
    close(client, a)
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        add(client, text="refused")
    assert b"stream s is closed: 4 entries wait" in client.get(IN)  # type: ignore[operator]
    close(client, a)
    assert client.xlen(CLOSED) == 4
    assert a.lease(S, 0.0) == StreamState(4, True, 0, Level.NORMAL, {"a": 0.0})
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


def test_devices_do_to_a_closed_stream_what_they_do_to_an_open_one(
    client: redis.Redis, a: Device, b: Device
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
    b.requeue(S, ids[1:3], [], 0)
    claimed = a.claim(S, 30)
    assert [one for one, _ in claimed.entries] == ids[1:3]
    a.dead_letter(S, claimed.entries[0], ["reason", "died"], ERROR)
    assert commit(a, claimed.entries[1]) == 1
    assert client.xlen(CLOSED) == 2
    assert commit(a, *before) == 1
    reopen(a)
    assert set(pending(client)) == {ids[3]}


def test_a_closed_stream_with_nothing_to_read_is_not_waited_for(client: redis.Redis, a: Device) -> None:
    for number in range(4):
        add(client, text=number)
    found = read(a)
    close(client, a)
    empty = a.read(S, 10, first_need=8, most_unread=9)
    assert (empty.entries, empty.last) == ([], None)
    assert not a.await_entries({S: found[-1][0]}, 60)  # it closed just before
    commit(a, *found)
    reopen(a)


def test_a_wait_for_an_entry_outlives_that_a_stream_is_closed_and_opened(
    url: str, client: redis.Redis, a: Device
) -> None:
    last = add(client, text=0)
    with redis.Redis.from_url(url) as other:
        waiting = threading.Thread(target=Device(other, "b").await_entries, args=({S: last}, 20))
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
            server = Device(own, name)
            while not ended.is_set() or own.exists(CLOSED) or own.xlen(IN):
                if found := read(server, 7):
                    assert commit(server, *found) == len(found)
                    done.update(texts_of(found))
                state = server.lease(S, 0.0)
                if state is not None:
                    server.enforce_hard_limit(S, state, 10)
                    own.delete(keys.stream(S, "upkeep"))

    threads = [threading.Thread(target=consume, args=[name]) for name in "ab"]
    for thread in threads:
        thread.start()
    produce()
    for thread in threads:
        thread.join()
    assert done == Counter(accepted)
    assert 0 < len(accepted) <= 1500
