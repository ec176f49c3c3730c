"""Entries on a real server: each is taken once and answered once, whoever takes it and dies."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Any

import pytest

from tests.redis.streams.peers import (
    ERROR,
    FIRST_NEED,
    IN,
    OUT,
    RESPONSE,
    Device,
    S,
    add,
    cut,
    pending,
    read,
    silence,
    take_one,
    texts_of,
    written,
)

if TYPE_CHECKING:
    import redis


def test_entries_are_read_in_order_and_once_by_any_number_of_devices(
    client: redis.Redis, a: Device, b: Device
) -> None:
    for number in range(20):
        add(client, text=number)
    mine, others = read(a, 7), read(b, 7)
    assert texts_of(mine) + texts_of(others) == [b"%d" % n for n in range(14)]
    assert texts_of(read(a)) == [b"%d" % n for n in range(14, 20)]
    assert read(b) == []


def test_the_first_read_creates_the_group_from_the_first_entry_on(
    client: redis.Redis, a: Device, b: Device
) -> None:
    assert read(a) == []
    client.delete(IN)
    add(client, text="before anybody read")
    assert texts_of(read(b)) == [b"before anybody read"]


def test_a_read_without_entries_says_behind_which_id_the_next_one_will_be(
    client: redis.Redis, a: Device
) -> None:
    entry_id = add(client, text="x")
    assert a.read(S, 1, first_need=8, most_unread=1).last is None
    last = a.read(S, 1, first_need=8, most_unread=1).last
    assert last == entry_id
    threading.Timer(0.05, add, [client], {"text": "y"}).start()
    a.await_entries({S: last}, 20)
    assert texts_of(read(a)) == [b"y"]


def test_nothing_is_read_while_too_many_responses_are_unread(client: redis.Redis, a: Device) -> None:
    for _ in range(3):
        client.xadd(OUT, {"v": "1"})
    add(client, text="x")
    add(client, text="12345678", key="k")
    assert read(a, 1, most_unread=4) != []
    assert read(a, most_unread=4) == []
    client.xadd(OUT, {"v": "1"})
    found = a.read(S, 10, first_need=FIRST_NEED, most_unread=4)
    assert (found.entries, found.takeable_texts, found.last) == ([], 0, None)
    assert a.read(S, 10, first_need=FIRST_NEED, most_unread=5).takeable_texts == 1
    cut(a, take_one(a), text_after="ended")


def test_a_commit_writes_acknowledges_and_deletes_in_one_step(client: redis.Redis, a: Device) -> None:
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
def test_entries_that_another_device_committed_are_left_out_of_a_response(
    client: redis.Redis, a: Device, b: Device, gone: set[int]
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
    client: redis.Redis, a: Device
) -> None:
    entry_id = add(client, text="x")
    read(a)
    assert a.commit(S, RESPONSE, [(entry_id, '{"id":"x"}', b"x")]).entries == 1
    assert a.commit(S, RESPONSE, [(entry_id, '{"id":"x"}', b"x")]).entries == 0
    assert a.commit(S, ERROR, [(entry_id, "", b"")]).entries == 0
    assert client.xlen(OUT) == 1


def test_an_error_has_neither_chunks_nor_vectors(client: redis.Redis, a: Device) -> None:
    entry_id = add(client, text="x")
    read(a)
    assert a.commit(S, ERROR, [(entry_id, "", b"")]).entries == 1
    (fields,) = written(client)
    expected = dict(zip(ERROR[::2], ERROR[1::2], strict=True))
    assert {name.decode(): value.decode() for name, value in fields.items()} == expected
    assert client.xlen(IN) == 0
