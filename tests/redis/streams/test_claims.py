"""Entries of a consumer that fell silent are claimed, and dead letters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.conftest import wait_until
from tests.redis.streams.peers import (
    DEAD,
    ERROR,
    IN,
    RESPONSE,
    Device,
    S,
    add,
    pending,
    read,
    silence,
    texts_of,
    written,
)

if TYPE_CHECKING:
    import redis


def test_entries_of_a_silent_consumer_are_claimed_one_at_a_time_with_their_deliveries(
    client: redis.Redis, a: Device, b: Device
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


def test_a_stream_that_no_device_has_read_has_nothing_to_claim(client: redis.Redis, a: Device) -> None:
    assert a.claim(S, 0).entries == []
    add(client, text="x")
    assert a.claim(S, 0).entries == []


def test_requeued_entries_are_claimed_at_once_and_together_and_count_as_never_delivered(
    client: redis.Redis, a: Device, b: Device
) -> None:
    ids = [add(client, text=n) for n in range(5)]
    read(a)
    silence(client, "a", ids[0])
    a.requeue(S, ids[1:4], [], 0)
    claimed = b.claim(S, 30)
    assert claimed.deliveries == 0
    assert [entry_id for entry_id, _ in claimed.entries] == ids[1:4]
    claimed = b.claim(S, 30)
    assert (claimed.deliveries, [entry_id for entry_id, _ in claimed.entries]) == (1, ids[:1])
    assert b.claim(S, 30).entries == []
    assert {entry_id: who for entry_id, (who, _) in pending(client).items()} == {
        **dict.fromkeys(ids[:4], "b"), ids[4]: "a"
    }  # fmt: skip


def test_a_requeued_entry_keeps_its_deliveries(client: redis.Redis, a: Device, b: Device) -> None:
    ids = [add(client, text=n) for n in range(2)]
    read(a)
    a.requeue(S, ids, [], 2)
    claimed = b.claim(S, 30)
    assert (claimed.deliveries, len(claimed.entries)) == (2, 1)


def test_refreshed_entries_are_not_claimed(client: redis.Redis, a: Device, b: Device) -> None:
    ids = [add(client, text=n) for n in range(2)]
    read(a)
    silence(client, "a", *ids)
    a.refresh(S, ids[:1], [], 60)
    claimed = b.claim(S, 30)
    assert [entry_id for entry_id, _ in claimed.entries] == ids[1:]
    assert pending(client) == {ids[0]: ("a", 1), ids[1]: ("b", 2)}


def test_an_entry_that_was_claimed_cannot_be_refreshed_or_requeued_by_its_former_consumer(
    client: redis.Redis, a: Device, b: Device
) -> None:
    entry_id = add(client, text="x")
    read(a)
    silence(client, "a", entry_id)
    assert b.claim(S, 30).entries
    silence(client, "b", entry_id)
    a.refresh(S, [entry_id], [], 60)
    a.requeue(S, [entry_id], [], 0)
    assert pending(client) == {entry_id: ("b", 2)}
    assert b.claim(S, 30).deliveries == 2  # nor was b's silence broken


def test_a_committed_entry_cannot_be_refreshed_or_requeued(
    client: redis.Redis, a: Device, b: Device
) -> None:
    entry_id = add(client, text="x")
    read(a)
    a.commit(S, RESPONSE, [(entry_id, '{"id":"x"}', b"x")])
    a.refresh(S, [entry_id], [], 60)
    a.requeue(S, [entry_id], [], 0)
    assert pending(client) == {}
    assert b.claim(S, 0).entries == []


def test_a_dead_letter_has_all_fields_of_its_entry_and_its_reader_gets_an_error(
    client: redis.Redis, a: Device
) -> None:
    given = {"text": "x\x00ü", "id": "i", "priority": "7", "unknown": "kept"}
    add(client, **given)
    other = add(client, text="other")
    raw, _ = read(a)
    for _ in range(2):  # the answer to the first was lost
        a.dead_letter(S, raw, ["reason", "died", "deliveries", 3], ERROR)
    (letter,) = written(client, DEAD)
    expected = {**given, "reason": "died", "deliveries": "3"}
    assert {name.decode(): value.decode() for name, value in letter.items()} == expected
    (fields,) = written(client)
    assert fields[b"kind"] == b"error"
    assert (client.xlen(IN), set(pending(client))) == (1, {other})


def test_a_deleted_entry_is_pending_no_more(client: redis.Redis, a: Device, b: Device) -> None:
    ids = [add(client, text=n) for n in range(2)]
    read(a)
    silence(client, "a", *ids)
    client.xdel(IN, ids[0])
    wait_until(lambda: b.claim(S, 30).entries)
    assert pending(client) == {ids[1]: ("b", 2)}
