"""A device is in the fleet for as long as the server hears of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from sutra_tasks import keys
from sutra_tasks.errors import UnsupportedVersionError
from sutra_tasks.fleet.balancing import Device, Fleet
from sutra_tasks.fleet.queues import lane
from sutra_tasks.fleet.registry import (
    DeviceRecord,
    Heartbeat,
    Sighting,
    ages,
    beat,
    fleet_of,
    leave,
    queue_lengths,
    sightings,
)
from sutra_tasks.fleet.server import embedded_server, free_port
from tests.conftest import wait_until

Start = Callable[..., Heartbeat]

RECORD = DeviceRecord(
    id="gpu0",
    incarnation="gpu0.12345678",
    host="Ü-host",
    pid=42,
    engine="simulated",
    compute="none",
    model="all-MiniLM-L6-v2",
    space="space",
    width=384,
    window=256,
    started_at=1_700_000_000.25,
    tasks=7,
    busy_s=0.125,
    p95_ms=12.5,
)


def seen_ago(client: redis.Redis, device_id: str, seconds: float) -> None:
    """Move a device's last heartbeat into the past."""
    now, micros = client.time()
    client.zadd(keys.FLEET, {device_id: now + micros / 1e6 - seconds})


def test_a_record_reads_back_as_it_was_written() -> None:
    assert DeviceRecord.from_json(RECORD.to_json()) == RECORD
    assert DeviceRecord.from_json(RECORD.to_json().encode()) == RECORD


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_a_record_of_another_version_is_refused(version: object) -> None:
    text = json.dumps({**json.loads(RECORD.to_json()), "v": version})
    with pytest.raises(UnsupportedVersionError) as refused:
        DeviceRecord.from_json(text)
    assert (refused.value.what, refused.value.supported) == ("device record", 1)
    assert refused.value.version == str(version)


def test_a_fleet_nobody_joined_is_empty(client: redis.Redis) -> None:
    assert ages(client) == {}
    assert sightings(client) == []
    assert fleet_of({}, 6.0) == Fleet()


def test_a_device_lives_from_its_first_heartbeat(client: redis.Redis, leaves: set[str]) -> None:
    beat(client, RECORD)
    leaves.add(keys.FLEET)
    [seen] = sightings(client)
    assert seen == Sighting("gpu0", seen.heartbeat_age_s, RECORD)
    assert 0 <= seen.heartbeat_age_s < 5
    assert fleet_of(ages(client), 6.0).devices == (Device("gpu0", "sutra.device.gpu0"),)


def test_a_device_dies_without_heartbeats_and_lives_with_the_next(
    client: redis.Redis, leaves: set[str]
) -> None:
    leaves.add(keys.FLEET)
    beat(client, RECORD)
    wait_until(lambda: not fleet_of(ages(client), 0.1).devices)
    dead = fleet_of(ages(client), 0.1)
    assert dead.known == 1
    assert dead.oldest_heartbeat_s is not None
    assert dead.oldest_heartbeat_s > 0.1
    beat(client, RECORD)
    assert fleet_of(ages(client), 6.0).devices


def test_a_device_lives_up_to_its_ttl() -> None:
    assert fleet_of({"gpu0": 6.0}, 6.0).devices
    assert not fleet_of({"gpu0": 6.001}, 6.0).devices


def test_the_clocks_of_hosts_do_not_matter(
    client: redis.Redis, leaves: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves.add(keys.FLEET)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    beat(client, RECORD)
    monkeypatch.setattr(time, "time", lambda: 4e9)
    assert ages(client)["gpu0"] < 5


def test_ages_count_from_the_last_heartbeat_and_are_no_whole_seconds(
    client: redis.Redis, leaves: set[str]
) -> None:
    leaves.add(keys.FLEET)
    seen_ago(client, "gpu0", 100)
    beat(client, replace(RECORD, id="gpu1"))
    seen = ages(client)
    assert 100 <= seen["gpu0"] < 105
    assert 0 <= seen["gpu1"] < 5
    fractions = set()
    for _ in range(3):
        beat(client, replace(RECORD, id="gpu1"))
        fractions.add((client.zscore(keys.FLEET, "gpu1") or 0.0) % 1)
    assert len(fractions) == 3


def test_a_dead_device_is_forgotten_after_an_hour(client: redis.Redis, leaves: set[str]) -> None:
    leaves.add(keys.FLEET)
    seen_ago(client, "gpu0", keys.FORGET_AFTER_S + 1)
    seen_ago(client, "gpu1", keys.FORGET_AFTER_S - 60)
    assert set(ages(client)) == {"gpu1"}
    assert client.zcard(keys.FLEET) == 1


def test_a_record_lasts_as_long_as_its_device_is_remembered(
    client: redis.Redis, leaves: set[str]
) -> None:
    leaves.add(keys.FLEET)
    beat(client, RECORD)
    assert keys.FORGET_AFTER_S - 30 < client.ttl(keys.device("gpu0")) <= keys.FORGET_AFTER_S


def test_devices_are_seen_in_order_of_their_ids(client: redis.Redis, leaves: set[str]) -> None:
    leaves.add(keys.FLEET)
    for name in ("gpu2", "gpu0", "gpu1"):
        beat(client, replace(RECORD, id=name))
    assert [seen.id for seen in sightings(client)] == ["gpu0", "gpu1", "gpu2"]
    assert [d.id for d in fleet_of(ages(client), 6.0).devices] == ["gpu0", "gpu1", "gpu2"]


@pytest.mark.parametrize("stored", [json.dumps({"v": 2, "id": "gpu0"}), None])
def test_a_device_whose_record_cannot_be_read_is_still_seen(
    client: redis.Redis, leaves: set[str], stored: str | None
) -> None:
    leaves.add(keys.FLEET)
    beat(client, RECORD)
    if stored is None:
        client.delete(keys.device("gpu0"))
    else:
        client.set(keys.device("gpu0"), stored, ex=60)
    [seen] = sightings(client)
    assert (seen.id, seen.record) == ("gpu0", None)


def test_who_leaves_is_gone_at_once_and_others_stay(client: redis.Redis, leaves: set[str]) -> None:
    leaves.add(keys.FLEET)
    for name in ("gpu0", "gpu1"):
        beat(client, replace(RECORD, id=name))
    leave(client, "gpu0")
    leave(client, "gpu0")
    assert [seen.id for seen in sightings(client)] == ["gpu1"]
    assert not client.exists(keys.device("gpu0"))


@pytest.fixture
def start_heartbeat() -> Iterator[Start]:
    started: list[Heartbeat] = []

    def start(client: redis.Redis, describe: Callable[[], DeviceRecord], interval_s: float) -> Heartbeat:
        started.append(Heartbeat(client, describe, interval_s))
        started[-1].start()
        return started[-1]

    yield start
    for heartbeat in started:
        heartbeat.stop()


def test_a_heartbeat_registers_at_once_and_leaves_when_stopped(
    client: redis.Redis, start_heartbeat: Start
) -> None:
    heartbeat = start_heartbeat(client, lambda: RECORD, 3600.0)
    wait_until(lambda: [seen.record for seen in sightings(client)] == [RECORD])
    heartbeat.stop()
    assert client.keys() == []
    heartbeat.stop()
    assert not heartbeat._thread.is_alive()


def test_a_heartbeat_goes_on_and_tells_what_is_new(client: redis.Redis, start_heartbeat: Start) -> None:
    beats = count()
    start_heartbeat(client, lambda: replace(RECORD, tasks=next(beats)), 0.01)

    def tasks() -> int:
        return max((seen.record.tasks for seen in sightings(client) if seen.record), default=0)

    wait_until(lambda: tasks() >= 5)


def test_a_heartbeat_that_never_began_can_be_stopped(client: redis.Redis) -> None:
    # A device worker may be stopped before it has reached its broker.
    Heartbeat(client, lambda: RECORD, 1.0).stop()


def test_a_heartbeat_outlives_an_absent_server(start_heartbeat: Start) -> None:
    port = free_port()
    described = count()

    def describe() -> DeviceRecord:
        next(described)
        return RECORD

    patient: Any = {"socket_timeout": 5.0, "retry": Retry(NoBackoff(), 0)}
    with redis.Redis(port=port, **patient) as own, redis.Redis(port=port, **patient) as client:
        heartbeat = start_heartbeat(own, describe, 0.02)
        wait_until(lambda: next(described) >= 3)
        with embedded_server(port):
            wait_until(lambda: set(ages(client)) == {"gpu0"})
        heartbeat.stop()  # with no server to tell


def test_waiting_messages_are_counted_over_all_lanes(client: redis.Redis, leaves: set[str]) -> None:
    for i, priority in enumerate((0, 3, 6, 9), start=1):
        client.lpush(lane("a", priority), *"x" * i)
    client.lpush(lane("b", 9), "x")
    leaves.update({*(lane("a", priority) for priority in (0, 3, 6, 9)), lane("b", 9)})
    assert queue_lengths(client, ["a", "b", "absent"]) == {"a": 10, "b": 1, "absent": 0}
    assert queue_lengths(client, []) == {}
