"""Names of queues' lists and of processes; a server would add nothing, so there is none."""

from types import SimpleNamespace
from typing import Any

import fakeredis
import pytest
from kombu.transport.redis import Channel as KombuChannel

from sutra_tasks import keys
from sutra_tasks.broker.load import load_key
from sutra_tasks.broker.queues import (
    NO_DEVICE,
    device_of,
    lane,
    lanes,
    new_incarnation,
    queue_lengths,
    requeue_target,
)
from sutra_tasks.errors import SettingsError
from sutra_tasks.settings import Settings

Channel: Any = KombuChannel  # untyped


def kombus_lane(queue: str, priority: int) -> str:
    stub: Any = SimpleNamespace(sep=Channel.sep, priority_steps=Channel.priority_steps)
    stub.priority = lambda n: Channel.priority(stub, n)
    found: str = Channel._q_for_pri(stub, queue, priority)
    return found


@pytest.mark.parametrize("priority", range(10))
def test_a_lane_is_the_list_kombu_sends_to(priority: int) -> None:
    assert lane("sutra.embed", priority) == kombus_lane("sutra.embed", priority)
    assert lane("sutra.embed", priority) in lanes("sutra.embed")


def test_lanes_are_kombus_in_the_order_it_serves_them() -> None:
    assert lanes("q") == tuple(kombus_lane("q", step) for step in Channel.priority_steps)
    assert len(set(lanes("q"))) == len(lanes("q")) == 4


@pytest.mark.parametrize(("priority", "nearest"), [(-1, 0), (10, 9), (10**6, 9)])
def test_a_priority_out_of_range_is_the_nearest(priority: int, nearest: int) -> None:
    assert lane("q", priority) == lane("q", nearest)


def test_a_queue_is_as_long_as_all_its_lanes() -> None:
    with fakeredis.FakeRedis() as client:
        for number, one in enumerate(lanes("q"), start=1):
            client.lpush(one, *["message"] * number)
        assert queue_lengths(client, ["q", "empty"]) == {"q": 10, "empty": 0}


@pytest.mark.parametrize(
    ("queue", "expected"),
    [
        (keys.EMBED_QUEUE, keys.EMBED_QUEUE),
        (keys.device_queue("gpu0"), keys.EMBED_QUEUE),  # to be routed afresh
        ("another", "another"),
    ],
)
def test_each_queue_has_one_that_its_messages_are_requeued_to(queue: str, expected: str) -> None:
    assert requeue_target(queue) == expected


@pytest.mark.parametrize("device", ["gpu0", "a-b_c", None])
def test_every_start_of_a_worker_has_a_name_of_its_own_that_tells_its_device(device: str | None) -> None:
    names = {new_incarnation(device) for _ in range(100)}
    assert len(names) == 100
    assert {device_of(name) for name in names} == {device}


def test_a_worker_without_a_device_has_no_devices_load() -> None:
    assert load_key("gpu0.1") == keys.load("gpu0")
    assert load_key(new_incarnation(None)) == keys.load(NO_DEVICE)
    with pytest.raises(SettingsError):
        Settings(device_id=NO_DEVICE)
