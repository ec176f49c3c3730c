"""Held messages, as far as no server is needed: names, marks, and what is said again."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as laws
from hypothesis import strategies as st
from kombu.transport.redis import Channel as KombuChannel

from sutra_tasks import keys
from sutra_tasks.fleet.held import HeldMessages
from sutra_tasks.fleet.queues import lane, lanes, new_incarnation

Channel: Any = KombuChannel  # untyped

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
FIELDS = st.dictionaries(st.sampled_from(["id", "lang", "é", ""]), JSON, max_size=3)


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


def test_every_start_of_a_worker_has_a_name_of_its_own() -> None:
    names = {new_incarnation("gpu0") for _ in range(100)}
    assert len(names) == 100
    assert all(name.startswith("gpu0.") for name in names)


@laws(max_examples=40, deadline=None)
@given(
    headers=st.none() | FIELDS,
    properties=FIELDS,
    info=FIELDS,
    body=st.text(max_size=20),
    priority=st.none() | st.integers(0, 9) | st.text(max_size=2),
)
def test_redelivering_marks_a_message_and_changes_nothing_else(
    headers: dict[str, Any] | None,
    properties: dict[str, Any],
    info: dict[str, Any],
    body: str,
    priority: Any,
) -> None:
    message: dict[str, Any] = {
        "body": body,
        "properties": properties
        | {"delivery_info": info | {"routing_key": "sutra.embed"}, "priority": priority},
    } | ({} if headers is None else {"headers": headers})
    redelivered = _redelivered(json.dumps(message).encode())
    assert redelivered is not None
    found, marked = redelivered
    assert found == (priority if isinstance(priority, int) else 0)

    found = json.loads(marked)
    assert found["headers"].pop("redelivered") is True
    assert found["properties"]["delivery_info"].pop("redelivered") is True
    if headers is None:
        assert found.pop("headers") == {}
    assert found == message


def test_what_no_answer_came_to_is_told_again_once_in_order() -> None:
    held = HeldMessages("gpu0.1")
    key, first, second = keys.held("gpu0.1"), "sutra.device.a", lane("sutra.device.b", 9)
    held.finish(b"1")
    held.finish(b"2")
    held.forward(b"3", "sutra.device.a", 0, load="load", weight=0)
    held.take_command(["q"], room=1, most_bytes=9)
    held.finish(b"4")  # while the answer is awaited
    held.forward(b"5", "sutra.device.b", 9, load="load", weight=0)
    held.not_told()
    held.not_told()

    _, _, *command = held.take_command(["q"], room=1, most_bytes=9)
    told = [b"1", b"2", b"4", b"3", b"5"]
    assert command == [4, key, first, second, "q", 3, 2, 1, 9, *told]
    held.told()
    held.not_told()
    assert not held.has_news
    _, _, *command = held.take_command(["q", "r"], room=0, most_bytes=9)
    assert command == [3, key, "q", "r", 0, 0, 0, 9]
