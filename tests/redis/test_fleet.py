"""A device is in the fleet for as long as the server hears of it."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from sutra_tasks import keys
from sutra_tasks.broker.load import MOST_CREDIT
from sutra_tasks.broker.queues import lane, queue_lengths
from sutra_tasks.health.states import DeviceState
from sutra_tasks.membership.fleet import FleetMember, beat, fleet_members, leave
from sutra_tasks.routing.snapshot import Device, Fleet, fleet_of
from tests.conftest import wait_until
from tests.records import RECORD
from tests.redis.peers import full_memory

if TYPE_CHECKING:
    import redis


@pytest.fixture(autouse=True)
def _beaten(leaves: set[str]) -> None:
    """What any heartbeat leaves behind."""
    leaves.update({keys.fleet(), keys.queues(), keys.leases()})


def seen_ago(client: redis.Redis, device_id: str, seconds: float) -> None:
    """Move a device's last heartbeat into the past."""
    now, micros = client.time()
    client.zadd(keys.fleet(), {device_id: now + micros / 1e6 - seconds})


def ages(client: redis.Redis) -> dict[str, float]:
    return {one.id: one.heartbeat_age_s for one in fleet_members(client)}


def test_a_fleet_nobody_joined_is_empty(client: redis.Redis, leaves: set[str]) -> None:
    leaves.clear()
    assert fleet_members(client) == []
    assert fleet_of([], 6.0) == Fleet()


def test_a_device_lives_from_its_first_heartbeat(client: redis.Redis) -> None:
    beat(client, RECORD)
    [seen] = fleet_members(client)
    assert seen == FleetMember("gpu0", seen.heartbeat_age_s, RECORD)
    assert 0 <= seen.heartbeat_age_s < 5
    [device] = fleet_of(fleet_members(client), 6.0).devices
    assert (device.id, device.queue) == ("gpu0", "sutra.device.gpu0")


def test_a_device_dies_without_heartbeats_and_lives_with_the_next(client: redis.Redis) -> None:
    beat(client, RECORD)
    wait_until(lambda: not fleet_of(fleet_members(client), 0.1).devices)
    dead = fleet_of(fleet_members(client), 0.1)
    assert dead.known == 1
    assert dead.oldest_heartbeat_s is not None
    assert dead.oldest_heartbeat_s > 0.1
    beat(client, RECORD)
    assert fleet_of(fleet_members(client), 6.0).devices


def test_beats_are_counted_for_each_start_of_a_worker(client: redis.Redis) -> None:
    other = replace(RECORD, incarnation="gpu0.87654321")
    assert [beat(client, one) for one in (RECORD, RECORD, other, RECORD)] == [1, 2, 1, 3]
    assert client.hgetall(keys.leases()) == {b"gpu0.12345678": b"3", b"gpu0.87654321": b"1"}
    client.hdel(keys.leases(), RECORD.incarnation)
    assert beat(client, RECORD) == 1


def test_the_clocks_of_hosts_do_not_matter(client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 0.0)
    beat(client, RECORD)
    monkeypatch.setattr(time, "time", lambda: 4e9)
    assert ages(client)["gpu0"] < 5


def test_ages_count_from_the_last_heartbeat_and_are_no_whole_seconds(client: redis.Redis) -> None:
    seen_ago(client, "gpu0", 100)
    beat(client, replace(RECORD, id="gpu1"))
    seen = ages(client)
    assert 100 <= seen["gpu0"] < 105
    assert 0 <= seen["gpu1"] < 5
    fractions = set()
    for _ in range(3):
        beat(client, replace(RECORD, id="gpu1"))
        fractions.add((client.zscore(keys.fleet(), "gpu1") or 0.0) % 1)
    assert len(fractions) == 3


def test_a_dead_device_is_forgotten_after_an_hour(client: redis.Redis, leaves: set[str]) -> None:
    leaves.intersection_update({keys.fleet()})
    seen_ago(client, "gpu0", keys.FORGET_AFTER_S + 1)
    seen_ago(client, "gpu1", keys.FORGET_AFTER_S - 60)
    assert set(ages(client)) == {"gpu1"}
    assert client.zcard(keys.fleet()) == 1


def test_a_record_lasts_as_long_as_its_device_is_remembered(client: redis.Redis) -> None:
    beat(client, RECORD)
    assert keys.FORGET_AFTER_S - 30 < client.ttl(keys.device("gpu0")) <= keys.FORGET_AFTER_S


def test_devices_are_seen_in_order_of_their_ids(client: redis.Redis) -> None:
    for name in ("gpu2", "gpu0", "gpu1"):
        beat(client, replace(RECORD, id=name))
    assert [seen.id for seen in fleet_members(client)] == ["gpu0", "gpu1", "gpu2"]
    assert [d.id for d in fleet_of(fleet_members(client), 6.0).devices] == ["gpu0", "gpu1", "gpu2"]


@pytest.mark.parametrize("stored", [json.dumps({"v": 1, "id": "gpu0"}), None])
def test_a_device_whose_record_cannot_be_read_is_still_seen_and_serves(
    client: redis.Redis, stored: str | None
) -> None:
    beat(client, RECORD)
    if stored is None:
        client.delete(keys.device("gpu0"))
    else:
        client.set(keys.device("gpu0"), stored, ex=60)
    [seen] = fleet_members(client)
    assert (seen.id, seen.record) == ("gpu0", None)
    [device] = fleet_of([seen], 6.0).devices
    assert device == Device("gpu0", "sutra.device.gpu0")
    assert device.has_credit


def test_who_leaves_is_gone_at_once_and_others_stay(client: redis.Redis) -> None:
    for name in ("gpu0", "gpu1"):
        beat(client, replace(RECORD, id=name))
    leave(client, "gpu0", RECORD.incarnation)
    leave(client, "gpu0", RECORD.incarnation)
    assert [seen.id for seen in fleet_members(client)] == ["gpu1"]
    assert not client.exists(keys.device("gpu0"))


def test_who_leaves_takes_no_other_start_of_its_device_along(client: redis.Redis) -> None:
    successor = replace(RECORD, incarnation="gpu0.87654321")
    beat(client, RECORD)
    beat(client, successor)
    leave(client, "gpu0", RECORD.incarnation)
    assert [seen.record for seen in fleet_members(client)] == [successor]


def test_a_device_whose_record_is_gone_can_leave(client: redis.Redis, leaves: set[str]) -> None:
    leaves.discard(keys.fleet())
    beat(client, RECORD)
    client.delete(keys.device("gpu0"))
    leave(client, "gpu0", RECORD.incarnation)
    assert fleet_members(client) == []


# --- what a strategy is told ---------------------------------------------------------------------


def load(client: redis.Redis, device_id: str, **counts: int) -> None:
    """Store what a device was sent and has not finished."""
    client.hset(keys.load(device_id), mapping=counts)  # type: ignore[arg-type]  # numbers are fine
    client.expire(keys.load(device_id), 60)


def test_a_strategy_is_told_what_a_device_says_and_what_it_was_sent(client: redis.Redis) -> None:
    beat(client, replace(RECORD, state=DeviceState.DEGRADED))
    load(client, "gpu0", messages=3, credit=1500, tokens_dispatched=9000, tokens_completed=2000)
    [device] = fleet_of(fleet_members(client), 6.0).devices
    assert device == Device(
        "gpu0",
        "sutra.device.gpu0",
        state=DeviceState.DEGRADED,
        backlog_tokens=7000,
        backlog_messages=3,
        credit_used=1500,
        credit_tokens=8192,
        tokens_per_s=1000.5,
        latency_s=0.25,
        space="space",
        latency_per_token_s=0.001,
    )


def test_a_device_nothing_was_sent_to_has_no_load(client: redis.Redis) -> None:
    beat(client, RECORD)
    [seen] = fleet_members(client)
    assert (seen.backlog_messages, seen.backlog_tokens, seen.credit_used) == (0, 0, 0)


def test_a_load_is_never_less_than_nothing(client: redis.Redis) -> None:
    # Whoever counted: an older version, say.
    beat(client, RECORD)
    load(client, "gpu0", messages=-2, credit=-5, tokens_dispatched=5, tokens_completed=9)
    [seen] = fleet_members(client)
    assert (seen.backlog_messages, seen.backlog_tokens, seen.credit_used) == (0, 0, 0)


@pytest.mark.parametrize(
    ("messages", "tokens", "credit"), [(2, 70, 70), (1, 100_000, MOST_CREDIT), (0, 0, 0)]
)
def test_work_that_came_past_the_router_is_part_of_a_backlog_and_uses_bounded_credit(
    client: redis.Redis, messages: int, tokens: int, credit: int
) -> None:
    beat(client, replace(RECORD, uncounted_messages=messages, uncounted_tokens=tokens))
    load(client, "gpu0", messages=1, credit=10, tokens_dispatched=30, tokens_completed=20)
    [seen] = fleet_members(client)
    assert (seen.backlog_messages, seen.backlog_tokens) == (1 + messages, 10 + tokens)
    assert seen.credit_used == 10 + credit


# --- a heartbeat and the load of its device ------------------------------------------------------


def test_a_device_with_nothing_waiting_and_nothing_held_loses_its_load(client: redis.Redis) -> None:
    load(client, "gpu0", messages=1, credit=10, tokens_dispatched=30, tokens_completed=20)
    load(client, "gpu1", messages=1)
    beat(client, RECORD)
    assert not client.exists(keys.load("gpu0"))
    assert client.exists(keys.load("gpu1"))


WORK = [keys.in_flight(RECORD.incarnation), *(lane(keys.device_queue("gpu0"), p) for p in (0, 3, 6, 9))]


@pytest.mark.parametrize("where", WORK)
def test_a_device_with_work_keeps_its_load_for_as_long_as_its_record(
    client: redis.Redis, leaves: set[str], where: str
) -> None:
    load(client, "gpu0", messages=1, credit=10, tokens_dispatched=30, tokens_completed=20)
    client.lpush(where, "a message")
    leaves.add(where)
    beat(client, RECORD)
    [seen] = fleet_members(client)
    assert (seen.backlog_messages, seen.backlog_tokens, seen.credit_used) == (1, 10, 10)
    assert keys.FORGET_AFTER_S - 30 < client.ttl(keys.load("gpu0")) <= keys.FORGET_AFTER_S


def test_a_full_server_still_hears_heartbeats(client: redis.Redis, leaves: set[str]) -> None:
    with full_memory(client):
        assert beat(client, RECORD) == 1
        assert fleet_of(fleet_members(client), 6.0).devices
        leave(client, "gpu0", RECORD.incarnation)
        assert fleet_members(client) == []
    leaves.discard(keys.fleet())


def test_waiting_messages_are_counted_over_all_lanes(client: redis.Redis, leaves: set[str]) -> None:
    leaves.clear()
    for i, priority in enumerate((0, 3, 6, 9), start=1):
        client.lpush(lane("a", priority), *"x" * i)
    client.lpush(lane("b", 9), "x")
    leaves.update({*(lane("a", priority) for priority in (0, 3, 6, 9)), lane("b", 9)})
    assert queue_lengths(client, ["a", "b", "absent"]) == {"a": 10, "b": 1, "absent": 0}
    assert queue_lengths(client, []) == {}
