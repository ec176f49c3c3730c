"""What stands in a queue is a message that a worker can run, or is refused by the name of a field."""

from __future__ import annotations

import base64
import bz2
import json
import lzma
import math
import zlib
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sutra_tasks import keys
from sutra_tasks.app import app
from sutra_tasks.broker.inflate import COMPRESSIONS, inflate
from sutra_tasks.broker.message_check import (
    TASKS,
    check_body,
    check_message,
    decode_body,
    parse,
    readable_id,
)
from sutra_tasks.client.embed_task import embed
from sutra_tasks.errors import InvalidMessageError

MOST = 1 << 20
SIGNATURE: dict[str, Any] = {"task": "x", "args": [], "kwargs": {}, "options": {}}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def sent(*args: Any, body: Any = None, **headers: Any) -> dict[str, Any]:
    """Return a message as Celery's own client sends it, with other headers; ``...`` removes one."""
    made = app.amqp.as_task_v2("an-id", keys.EMBED_TASK, args=args or ("a text",))
    changed = {**json.loads(json.dumps(made.headers)), **headers}
    text = json.dumps(list(made.body) if body is None else body).encode()
    return {
        "body": base64.b64encode(text).decode(),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {name: value for name, value in changed.items() if value is not ...},
        "properties": {"body_encoding": "base64", "delivery_tag": "t", "correlation_id": "an-id"},
    }


def check(message: Any, queue: str = keys.EMBED_QUEUE) -> Any:
    """Check all of a message, and return its decoded body."""
    check_message(message, queue, most_bytes=MOST)
    return decode_body(message, most_bytes=MOST)[1]


def refused_field(message: Any, queue: str = keys.EMBED_QUEUE) -> str:
    with pytest.raises(InvalidMessageError) as refusal:
        check(message, queue)
    return refusal.value.field


def test_what_celerys_client_sends_is_accepted() -> None:
    when = datetime(2030, 1, 1, tzinfo=UTC)
    signature = embed.s("then")
    made = app.amqp.as_task_v2(
        "an-id", keys.EMBED_TASK, args=("a",), eta=when, expires=when, retries=1, group_id="g",
        group_index=2, time_limit=5, soft_time_limit=2.5, callbacks=[signature], errbacks=[signature],
        chord=signature, chain=[signature], shadow="s", headers={"mine": {"any": ["thing"]}},
        stamped_headers=["stamp"], stamp="x", replaced_task_nesting=1, ignore_result=True,
    )  # fmt: skip
    message = sent(body=json.loads(json.dumps(made.body)), **json.loads(json.dumps(made.headers)))
    args, _, callbacks = check(message)
    assert args == ["a"]
    assert callbacks["chord"]["task"] == keys.EMBED_TASK


@pytest.mark.parametrize("queue", [*TASKS, keys.device_queue("gpu0")])
def test_each_queue_has_tasks_of_its_own(queue: str) -> None:
    owner = keys.EMBED_QUEUE if queue not in TASKS else queue
    for task in TASKS[owner]:
        check(sent(task=task, body=[[], {}, {}]), queue)
    assert refused_field(sent(task="myapp.add"), queue) == "headers.task"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"id": ["x"]}, "headers.id"),
        ({"id": ...}, "headers.id"),
        ({"id": ""}, "headers.id"),
        ({"id": "\ud800"}, "headers.id"),
        ({"task": ...}, "headers.task"),
        ({"task": ["sutra.embed"]}, "headers.task"),
        ({"expires": "soon"}, "headers.expires"),
        ({"expires": 5}, "headers.expires"),
        ({"eta": "0001-01-01T00:00:00+14:00"}, "headers.eta"),
        ({"timelimit": [1]}, "headers.timelimit"),
        ({"timelimit": ["1", None]}, "headers.timelimit[0]"),
        ({"retries": True}, "headers.retries"),
        ({"group": 5}, "headers.group"),
        ({"compression": "application/zstd-none"}, "headers.compression"),
        ({"stamps": []}, "headers.stamps"),
        ({"stamped_headers": [5]}, "headers.stamped_headers[0]"),
        ({"chord": {}}, "headers.chord"),
        ({"as_execution_options": 1}, "headers.as_execution_options"),
        ({"body": 5}, "body"),
        ({"body": [["hi"], {}]}, "body"),
        ({"body": [5, {}, {}]}, "body[0]"),
        ({"body": [["hi"], [], {}]}, "body[1]"),
        ({"body": [["hi"], {}, []]}, "body[2]"),
        ({"body": [["hi"], {}, {"id": "other"}]}, "body[2]"),
        ({"body": [["hi"], {}, {"callbacks": ["x"]}]}, "body[2].callbacks[0]"),
        ({"body": [["hi"], {}, {"errbacks": [{"task": 5}]}]}, "body[2].errbacks[0].task"),
        ({"body": [["hi"], {}, {"chord": {**SIGNATURE, "args": 1}}]}, "body[2].chord.args"),
        ({"body": [["hi"], {}, {"chain": [{**SIGNATURE, "subtask_type": "chord"}]}]},
         "body[2].chain[0]"),
        ({"body": [["hi"], {}, {"callbacks": [{**SIGNATURE, "options": {"link": ["y"]}}]}]},
         "body[2].callbacks[0].options.link[0]"),
    ],
)  # fmt: skip
def test_the_field_at_fault_is_named(change: dict[str, Any], field: str) -> None:
    assert refused_field(sent(**change)) == field


@pytest.mark.parametrize(
    ("part", "value", "field"),
    [
        ("headers", None, "headers"),
        ("properties", [], "properties"),
        ("content-type", "application/x-python-serialize", "content-type"),
        ("content-encoding", "utf-16", "content-encoding"),
        ("body", None, "body"),
        ("body", "***", "body"),
        ("body", "é", "body"),
        ("body", "\ud800", "body"),
        ("body", base64.b64encode(b"[[").decode(), "body"),
        ("body", base64.b64encode(b"[" * 100_000).decode(), "body"),
        ("body", "x" * (9 * MOST + (2 << 20)), "body"),
        ("properties", {"body_encoding": "rot13"}, "properties.body_encoding"),
        ("properties", {"priority": "high"}, "properties.priority"),
        ("properties", {"delivery_info": "x"}, "properties.delivery_info"),
        ("properties", {"delivery_info": {"routing_key": 5}}, "properties.delivery_info.routing_key"),
    ],
)
def test_every_part_of_a_message_is_checked(part: str, value: Any, field: str) -> None:
    assert refused_field({**sent(), part: value}) == field


@pytest.mark.parametrize("raw", [b"", b"[[", b"\xff", b"[" * 100_000, b'{"__type__": "uuid"}x'])
def test_bytes_that_are_no_json_are_refused(raw: bytes) -> None:
    with pytest.raises(InvalidMessageError) as refusal:
        parse(raw)
    assert refusal.value.field == "message"


@given(JSON)
@settings(max_examples=100)
def test_any_json_is_accepted_or_refused_and_nothing_else(value: Any) -> None:
    for message in (
        value,
        {**sent(), "headers": value},
        {**sent(), "properties": value},
        sent(body=value),
    ):
        try:
            check(message)
        except InvalidMessageError as refusal:
            assert refusal.field  # noqa: PT017 - being accepted is fine as well
        readable_id(message)


@given(st.sampled_from(sorted(sent()["headers"])), JSON)
@settings(max_examples=100)
def test_any_value_of_any_header_is_accepted_or_refused(name: str, value: Any) -> None:
    try:
        check(sent(**{name: value}))
    except InvalidMessageError as refusal:
        assert refusal.field.startswith("headers.")  # noqa: PT017 - being accepted is fine as well


@pytest.mark.parametrize(
    ("headers", "properties", "found"),
    [
        ({"id": "a"}, {}, "a"),
        ({"id": 5}, {}, "5"),
        ({"id": ["x"]}, {"correlation_id": "b"}, "b"),
        ({"id": None}, {"correlation_id": 1.5}, None),
        (None, {"correlation_id": "b"}, "b"),
        ({"id": "x" * 256}, {}, None),
        ({"id": math.nan}, [], None),
    ],
)
def test_a_sender_is_told_under_the_id_that_can_be_read(
    headers: Any, properties: Any, found: str | None
) -> None:
    assert readable_id({"headers": headers, "properties": properties}) == found


def test_a_shape_is_told_in_the_words_of_json() -> None:
    with pytest.raises(InvalidMessageError, match=r"body\[0\] .* a list is needed, not a whole number"):
        check_body([5, {}, {}])


# --- compression ---------------------------------------------------------------------------------

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "application/x-gzip": zlib.compress,
    "bzip2": bz2.compress,
    "lzma": lzma.compress,
}


@pytest.mark.parametrize("name", COMPRESS)
def test_what_was_compressed_comes_back(name: str) -> None:
    assert inflate(COMPRESS[name](b"a text"), name, 6) == b"a text"


@pytest.mark.parametrize("name", COMPRESS)
def test_a_bomb_is_decompressed_to_its_limit_only(name: str) -> None:
    bomb = COMPRESS[name](b" " * 5_000_000)
    with pytest.raises(InvalidMessageError, match="more than 1000 bytes"):
        inflate(bomb, name, 1000)


@pytest.mark.parametrize("name", COMPRESS)
@pytest.mark.parametrize("damage", [b"", b"x", None])
def test_what_is_corrupt_or_cut_is_refused(name: str, damage: bytes | None) -> None:
    body = COMPRESS[name](b"a text" * 100)[:-9] if damage is None else damage
    with pytest.raises(InvalidMessageError):
        inflate(body, name, 10_000)


def test_every_compression_of_kombus_senders_is_known() -> None:
    from kombu.compression import encoders  # noqa: PLC0415 - beside its one use

    assert set(encoders()) - {"application/x-brotli"} <= set(COMPRESSIONS)
