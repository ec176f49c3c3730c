"""The form in which a message is requeued, and what it weighs."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from celery.app.trace import build_tracer
from celery.backends.cache import CacheBackend
from celery.signals import before_task_publish
from hypothesis import given
from hypothesis import settings as laws
from hypothesis import strategies as st

from sutra_tasks import keys
from sutra_tasks.broker import requeue
from sutra_tasks.broker.attempts import (
    ATTEMPTS,
    DEATHS_NEARBY,
    DEATHS_NEARBY_PER_ATTEMPT,
    SUSPECT_AFTER,
    attempts_of,
)
from sutra_tasks.broker.load import tokens_of, weight_of
from sutra_tasks.broker.requeue import _requeued, requeue_in_flight
from sutra_tasks.client.call import demand_of, estimated_tokens

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
FIELDS = st.dictionaries(st.sampled_from(["id", "lang", "é", ""]), JSON, max_size=3)


def message(routing_key: Any = keys.EMBED_QUEUE, **headers: Any) -> dict[str, Any]:
    return {
        "body": "x" * 40,
        "headers": headers,
        "properties": {"delivery_info": {"routing_key": routing_key}},
    }


def raw(value: Any) -> bytes:
    return json.dumps(value).encode()


def attempts_after(headers: dict[str, Any], **how: Any) -> int:
    """Return the attempts that a message with these headers counts when it was requeued."""
    found = _requeued(raw(message(**headers)), **how)
    assert found is not None
    return attempts_of(json.loads(found.message)["headers"])


@laws(max_examples=40, deadline=None)
@given(
    headers=st.none() | FIELDS,
    properties=FIELDS,
    info=FIELDS,
    body=st.text(max_size=20),
    priority=st.none() | st.integers(0, 9) | st.sampled_from(["", "x", "é9"]),
)
def test_redelivering_marks_a_message_and_changes_nothing_else(
    headers: dict[str, Any] | None,
    properties: dict[str, Any],
    info: dict[str, Any],
    body: str,
    priority: Any,
) -> None:
    sent: dict[str, Any] = {
        "body": body,
        "properties": properties
        | {"delivery_info": info | {"routing_key": "sutra.embed"}, "priority": priority},
    } | ({} if headers is None else {"headers": headers})
    found = _requeued(raw(sent))
    assert found is not None
    assert found.priority == (priority if isinstance(priority, int) else 0)
    assert found.weight == tokens_of(sent)

    found = json.loads(found.message)
    assert found["headers"].pop("redelivered") is True
    assert found["properties"]["delivery_info"].pop("redelivered") is True
    if headers is None:
        assert found.pop("headers") == {}
    assert found == sent


def test_what_no_worker_has_taken_is_requeued_as_it_came() -> None:
    sent = b' {"properties": {"delivery_info": {"routing_key": "sutra.embed"}}, "body": ""}'
    found = _requeued(sent, redelivered=False)
    assert found is not None
    assert found.message == sent


def test_each_death_counts_one_attempt_until_a_message_is_suspect() -> None:
    assert attempts_after({}) == 0
    assert attempts_after({}, died=True) == 1
    assert attempts_after({ATTEMPTS: 1}, died=True) == SUSPECT_AFTER
    assert attempts_after({ATTEMPTS: 4}) == 4


def test_a_death_near_a_suspect_counts_little() -> None:
    # Two messages that end their workers took innocent ones with them: these shared three deaths.
    per_attempt = DEATHS_NEARBY_PER_ATTEMPT
    message_: Any = raw(message(**{ATTEMPTS: SUSPECT_AFTER}))
    for deaths in range(1, 2 * per_attempt + 1):
        found = _requeued(message_, died=True)
        assert found is not None
        message_ = found.message
        assert attempts_of(json.loads(message_)["headers"]) == SUSPECT_AFTER + deaths // per_attempt


def test_if_a_suspect_is_named_only_it_is_to_blame() -> None:
    assert attempts_after({"id": "it", ATTEMPTS: 2}, died=True, suspect_id="it") == 3
    assert attempts_after({"id": "it", ATTEMPTS: 2, DEATHS_NEARBY: 5}, died=True, suspect_id="it") == 3
    assert attempts_after({"id": "other", ATTEMPTS: 2}, died=True, suspect_id="it") == 2
    assert attempts_after({}, died=True, suspect_id="it") == 0


@pytest.mark.parametrize("count", [None, -1, "3", 2.0, True, [1]])
def test_attempts_that_are_no_count_are_none(count: Any) -> None:
    assert attempts_of({ATTEMPTS: count}) == 0
    assert attempts_after({ATTEMPTS: count}, died=True) == 1


def test_a_message_without_headers_has_no_attempts() -> None:
    assert attempts_of(None) == attempts_of({}) == 0


def test_a_message_weighs_what_its_sender_says() -> None:
    header = {"v": 1, "texts": 3, "bytes": 400}
    assert weight_of(message(sutra=header)) == demand_of(header, 0).tokens == 106


@pytest.mark.parametrize("header", [None, {"v": 99}, "not a header", []])
def test_a_message_that_does_not_say_weighs_its_size(header: Any) -> None:
    assert weight_of(message(sutra=header)) == estimated_tokens(1, 40)


def test_a_message_always_weighs_something() -> None:
    assert weight_of(message(sutra={"v": 1, "texts": 0, "bytes": 0})) == 1
    assert weight_of({**message(), "body": None, "headers": None}) >= 1


def test_a_message_sent_past_the_router_weighs_nothing() -> None:
    past = message(keys.device_queue("gpu0"), sutra={"v": 1, "texts": 1, "bytes": 4})
    assert weight_of(past) == 0
    assert tokens_of(past) == 3


@pytest.mark.parametrize("routing_key", [None, "", "celery"])
def test_a_routing_key_of_another_client_changes_no_weight(routing_key: Any) -> None:
    assert weight_of(message(routing_key)) == weight_of(message())


def test_an_unreadable_message_in_flight_does_not_keep_the_others_from_being_requeued(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # requeue_in_flight: JSONDecodeError or KeyError at one message, and at every later start again.
    good = raw(message())
    returned: list[bytes] = []

    def move(_client: Any, *, messages: list[bytes], **_: Any) -> int:
        returned.extend(messages)
        return len(messages)

    monkeypatch.setattr(requeue, "REQUEUE", move)
    client: Any = SimpleNamespace(
        lrange=lambda *_: [b"not json", b"{}", good],
    )
    assert requeue_in_flight(client, "gpu0.1") == 3
    assert returned == [b"not json", b"{}", good]


def test_celery_sends_what_follows_a_task_before_it_stores_a_success_and_counts_a_chord_after() -> None:
    # What lets a stored success end a message that is in no chord.
    told: list[str] = []

    class Backend(CacheBackend):  # type: ignore[misc]  # Celery is untyped
        def store_result(self, *_: Any, **__: Any) -> None:
            told.append("result")

        def on_chord_part_return(self, *_: Any, **__: Any) -> None:
            told.append("chord")

    app = Celery("t", broker="memory://", set_as_current=False)

    def one() -> int:
        return 1

    task = app.task(name="t.task")(one)
    task.backend = Backend(app, url="memory")

    def sent(sender: str, **_: Any) -> None:
        told.append(sender)

    before_task_publish.connect(sent)
    try:
        trace = build_tracer(task.name, task, app=app)
        trace(
            "id", (), {},
            {
                "id": "id", "group": "g", "chord": app.signature("t.body"), "delivery_info": {},
                "callbacks": [app.signature("t.link")], "chain": [app.signature("t.next")],
            },
        )  # fmt: skip
    finally:
        before_task_publish.disconnect(sent)
    assert told == ["t.link", "t.next", "result", "chord"]
