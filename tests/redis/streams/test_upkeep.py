"""Devices report, take turns at the upkeep of a stream, and free memory on a full server."""

from __future__ import annotations

from typing import Any

import pytest
import redis

from sutra_tasks import keys
from sutra_tasks.keys import DEVICES_GROUP
from sutra_tasks.streaming.backpressure import Level
from sutra_tasks.streaming.upkeep_store import StreamState
from tests.redis.peers import full_memory
from tests.redis.streams.peers import (
    ERROR,
    IN,
    OUT,
    STATE,
    Device,
    S,
    add,
    close,
    commit,
    cut,
    read,
    reopen,
    take,
    take_one,
)

# What devices say.


def test_one_device_at_a_time_has_the_lease_on_the_upkeep_of_a_stream(
    client: redis.Redis, a: Device, b: Device
) -> None:
    add(client, text="x")
    client.xadd(OUT, {"v": "1"})
    state = a.lease(S, 0.5)
    assert state == StreamState(1, False, 1, Level.NORMAL, {"a": 0.5})
    assert b.lease(S, 0.5) is None
    client.delete(keys.stream(S, "upkeep"))
    b.publish_backpressure(S, Level.SEVERE, Level.NORMAL, capacity=7, load=0.9, per_s=3)
    again = b.lease(S, 0.25)
    assert again is not None
    assert again.level is Level.SEVERE
    said: Any = client.hgetall(STATE)
    assert (said[b"capacity"], said[b"throttle_rate"], said[b"shed"]) == (b"7", b"0.5", b"1")
    assert 0 < client.ttl(STATE) <= keys.STATE_S
    assert client.hget(keys.stream(S, "totals"), "backpressure_events") == b"1"


def test_the_load_of_a_device_that_died_is_forgotten(client: redis.Redis, a: Device, b: Device) -> None:
    def seen() -> dict[str, float]:
        client.delete(keys.stream(S, "upkeep"))
        state = a.lease(S, 0.5)
        assert state is not None
        return dict(state.loads)

    b.report_load(0.875)
    a.report_load(0.5)
    assert seen() == {"a": 0.5, "b": 0.875}
    dead: Any = client.hget(keys.stream_loads(), "b")
    load, _, at_ms = dead.partition(b" ")
    client.hset(keys.stream_loads(), "b", b"%s %d" % (load, int(at_ms) - 1000 * keys.STATE_S - 1))
    a.report_load(0.5)
    assert seen() == {"a": 0.5}
    assert 0 < client.ttl(keys.stream_loads()) <= keys.STATE_S
    a.remove_reports()
    assert client.exists(keys.stream_loads()) == 0


# A server without memory for more.


def test_devices_free_memory_on_a_full_server(client: redis.Redis, a: Device, b: Device) -> None:
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
        a.requeue(S, ids[:1], texts[1:], 0)
        assert cut(a, texts[0], letter=["key", "k"]).entries == 1
        assert [one for one, _ in b.claim(S, 30).entries] == ids[:1]
        a.dead_letter(S, found[1], ["reason", "died"], ERROR)
        assert commit(a, *found[2:]) == 2
        a.flush_texts(S, 0.0)
        a.report_load(0.5)
        close(client, a, 0)
        reopen(a, 10)
        assert cut(b, take_one(b), text_after="ended").entries == 1
    assert client.xlen(IN) == 1
    assert client.xlen(OUT) == 4


def test_every_stream_is_listed_and_nothing_that_cannot_be_one(client: redis.Redis, a: Device) -> None:
    client.delete(keys.streams())
    assert a.streams() == []
    client.sadd(keys.streams(), "b", "a", "no name", b"\xff", "a:b", "")
    assert a.streams() == ["a", "b"]


def test_silent_consumers_are_removed_unless_they_have_pending_entries(
    client: redis.Redis, a: Device, b: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def consumers() -> set[str]:
        found: Any = client.xinfo_consumers(IN, DEVICES_GROUP)
        return {one["name"].decode() for one in found}

    add(client, text="x")
    assert len(read(a)) == 1
    assert read(b) == []
    known = consumers()
    a.remove_silent_consumers(S)
    assert consumers() == known
    monkeypatch.setattr(keys, "FORGET_AFTER_S", -1)
    a.remove_silent_consumers(S)
    assert consumers() == {"a"}
