"""The messages of a chord of parts: what the caller sent stays in the body, and in no part twice."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from unittest.mock import Mock

import pytest
from celery import Celery
from celery.exceptions import Ignore, TaskRevokedError
from celery.worker.request import Request
from hypothesis import given
from hypothesis import settings as laws
from hypothesis import strategies as st
from kombu import Connection, Producer, Queue

from sutra_tasks import keys
from sutra_tasks.app import app
from sutra_tasks.broker.attempts import ATTEMPTS, DEATHS_NEARBY, attempts_of
from sutra_tasks.broker.load import weight_of
from sutra_tasks.client.call import HEADER, Call, demand_of
from sutra_tasks.fanout import tasks as parts
from sutra_tasks.fanout.messages import body_message, part_demand, part_message
from sutra_tasks.settings import Settings

ID = "0123-caller"
EXPIRES = datetime(2100, 1, 1, tzinfo=UTC)
WHEN = datetime(2030, 5, 6, 7, 8, 9, tzinfo=UTC)
host = Celery("host", broker="memory://", set_as_current=False)


class Sent(NamedTuple):
    """A call's message: as it stands in its list, and its decoded body."""

    raw: bytes
    payload: list[Any]

    @property
    def body(self) -> dict[str, Any]:
        made: dict[str, Any] = json.loads(body_message(self.raw, self.payload))
        return made


def sent(*, priority: int = 0, compression: str | None = None, **options: Any) -> Sent:
    """Send a call as a stock client does."""
    text = "a text that is long"
    call = Call.of([text], {}, Settings())
    made = host.amqp.as_task_v2(ID, keys.EMBED_TASK, args=(text,), kwargs={"details": True}, **options)
    with Connection("memory://") as connection, connection.channel() as channel:
        host.amqp.send_task_message(
            Producer(channel),
            keys.EMBED_TASK,
            made,
            queue=Queue(keys.EMBED_QUEUE),
            priority=priority,
            compression=compression,
            headers={HEADER: call.header(sent_at=7.5, strategy="round_robin")},
        )
        payload = channel._get(keys.EMBED_QUEUE)
        return Sent(json.dumps(payload).encode(), channel.message_to_python(payload).payload)


def received(message: str | dict[str, Any], task: Any) -> Request:
    """Return Celery's request for a message in a list."""
    payload = json.loads(message) if isinstance(message, str) else message
    with Connection("memory://") as connection, connection.channel() as channel:
        return Request(channel.message_to_python(payload), app=app, task=task)


def full() -> Sent:
    """Return a message with everything a caller can ask for."""
    callback = host.signature("host.save", kwargs={"when": WHEN}).set(queue="host")
    return sent(
        priority=6,
        expires=EXPIRES,
        callbacks=[callback],
        errbacks=[host.signature("host.alarm").set(queue="host")],
        chain=[host.signature("host.next", args=({"at": WHEN},)).set(queue="host")],
        chord=host.signature("host.stack").set(queue="host", chord_size=3),
        group_id="a-group",
        group_index=2,
        root_id="a-root",
        parent_id="a-parent",
        stamped_headers=["tenant"],
        tenant="acme",
        ignore_result=False,
    )


# The body.


def test_the_body_is_the_callers_message_under_another_name() -> None:
    one = full()
    before, body = json.loads(one.raw), one.body
    assert body["headers"].pop("task") == keys.COMBINE_TASK
    assert body["headers"].pop("argsrepr") == "()"
    assert body["headers"].pop("kwargsrepr") == "{}"
    assert demand_of(body["headers"].pop(HEADER), 0).tokens == 2  # to the router it is next to nothing
    for name in ("task", "argsrepr", "kwargsrepr", HEADER):
        del before["headers"][name]
    assert body["headers"] == before["headers"]
    assert body["headers"]["id"] == ID
    assert body["headers"]["expires"] == EXPIRES.isoformat()
    assert (body["headers"]["group"], body["headers"]["group_index"]) == ("a-group", 2)
    assert (body["headers"]["root_id"], body["headers"]["parent_id"]) == ("a-root", "a-parent")
    assert body["headers"]["stamps"] == {"tenant": "acme"}
    assert body["properties"]["priority"] == 6
    assert body["properties"]["correlation_id"] == ID
    assert body["properties"]["delivery_tag"] != before["properties"]["delivery_tag"]


def test_a_worker_reads_from_the_body_what_it_would_of_the_call() -> None:
    one = full()
    request, original = received(one.body, parts.combine), received(one.raw.decode(), parts.combine)
    args, kwargs, embedded = request._payload
    assert (list(args), dict(kwargs)) == ([], {})
    assert embedded == original._payload[2]
    assert embedded["callbacks"][0]["kwargs"]["when"] == WHEN
    assert embedded["chain"][0]["args"][0]["at"] == WHEN
    assert request.id == ID
    assert request.name == keys.COMBINE_TASK
    assert request.expires == original.expires == EXPIRES
    assert [one["task"] for one in request._context.callbacks] == ["host.save"]
    assert [one["task"] for one in request._context.errbacks] == ["host.alarm"]
    assert request.chord["task"] == "host.stack"
    assert request._context.chain[0]["task"] == "host.next"
    assert (request.group, request._context.group_index) == ("a-group", 2)
    assert request.delivery_info["priority"] == 6


@pytest.mark.parametrize("compression", ["zlib", "bzip2"])
def test_a_call_that_came_compressed_has_a_body_that_is_not(compression: str) -> None:
    one = sent(compression=compression, callbacks=[host.signature("host.save")])
    assert "compression" in json.loads(one.raw)["headers"]
    assert "compression" not in one.body["headers"]
    assert received(one.body, parts.combine)._context.callbacks[0]["task"] == "host.save"


def test_the_body_has_none_of_the_attempts_at_the_call_and_parts_begin_at_their_first() -> None:
    one = sent()
    message = json.loads(one.raw)
    message["headers"] |= {ATTEMPTS: 2, DEATHS_NEARBY: 5, "redelivered": True, "retries": 3}
    message["properties"]["delivery_info"]["redelivered"] = True
    body = Sent(json.dumps(message).encode(), one.payload).body
    assert attempts_of(body["headers"]) == 0
    assert not {ATTEMPTS, DEATHS_NEARBY, "redelivered"} & body["headers"].keys()
    assert "redelivered" not in body["properties"]["delivery_info"]
    assert body["headers"]["retries"] == 3
    assert json.loads(part_message(body, 0, 1, 3, 1000))["headers"]["retries"] == 0


@pytest.mark.parametrize("header", [None, "no header", 7])
def test_a_call_of_another_client_has_a_body_and_parts_too(header: Any) -> None:
    one = sent()
    message = json.loads(one.raw)
    if header is None:
        del message["headers"][HEADER]
    else:
        message["headers"][HEADER] = header
    body = Sent(json.dumps(message).encode(), one.payload).body
    assert demand_of(body["headers"][HEADER], 0).tokens == 2
    assert weight_of(json.loads(part_message(body, 0, 1, 3, 1000))) == 1000


# A part.


def test_a_part_knows_its_document_and_its_place_in_it() -> None:
    body = full().body
    request = received(part_message(body, 3, 7, 10, 4000), parts.part)
    assert request.name == keys.PART_TASK
    assert request.id == f"{ID}:3"
    assert (request.group, request._context.group_index) == (ID, 3)
    assert request.parent_id == ID
    assert request.root_id == "a-root"
    assert request.chord["task"] == keys.COMBINE_TASK
    assert request.chord["chord_size"] == 7
    assert request.chord["options"]["task_id"] == ID
    assert request.correlation_id == request.id
    assert list(request.args) == []
    assert dict(request.kwargs) == {}


def test_a_part_keeps_priority_deadline_and_stamps_and_calls_nobody_back() -> None:
    message = part_message(full().body, 3, 7, 10, 4000)
    request = received(message, parts.part)
    assert json.loads(message)["properties"]["priority"] == 6
    assert request.delivery_info["priority"] == 6
    assert request.expires == EXPIRES
    assert request.stamps == {"tenant": "acme"}
    context = request._context
    assert not context.callbacks
    assert not context.errbacks
    assert not context.chain
    assert request.ignore_result
    assert not request.store_errors
    assert request.request_dict["retries"] == 0
    assert "host." not in message


def test_a_part_of_a_call_that_ends_late_is_refused_late() -> None:
    late = sent(expires=datetime.now(UTC) - timedelta(seconds=5)).body
    assert received(part_message(late, 0, 1, 1, 10), parts.part).maybe_expire()
    soon = sent(expires=datetime.now(UTC) + timedelta(seconds=500)).body
    assert not received(part_message(soon, 0, 1, 1, 10), parts.part).maybe_expire()


@laws(max_examples=80, deadline=None)
@given(rows=st.integers(1, 10_000), more=st.integers(0, 10**6), index=st.integers(0, 10**4))
def test_a_part_weighs_its_tokens_whoever_asks(rows: int, more: int, index: int) -> None:
    tokens = 2 * rows + more  # every row has its special tokens
    body = json.loads(body_message(BARE.raw, BARE.payload))
    message = json.loads(part_message(body, index, index + 1, rows, tokens))
    demand = demand_of(message["headers"][HEADER], 0)
    assert part_demand(rows, tokens).tokens == demand.tokens == weight_of(message) == tokens
    assert (demand.texts, demand.sent_at, demand.strategy) == (rows, 7.5, "round_robin")


@laws(max_examples=50, deadline=None)
@given(rows=st.integers(1, 1000), tokens=st.integers(0, 5000))
def test_a_part_always_weighs_something(rows: int, tokens: int) -> None:
    message = json.loads(part_message(BARE.body, 0, 1, rows, tokens))
    assert weight_of(message) == part_demand(rows, tokens).tokens >= 1


def test_a_part_is_the_same_whenever_it_is_made_but_for_its_delivery() -> None:
    body = full().body
    one, again = (json.loads(part_message(body, 3, 7, 10, 4000)) for _ in range(2))
    assert one["properties"].pop("delivery_tag") != again["properties"].pop("delivery_tag")
    assert one == again


def test_making_parts_changes_no_body() -> None:
    body = full().body
    before = json.dumps(body)
    part_message(body, 3, 7, 10, 4000)
    assert json.dumps(body) == before


# The body of a document that was given up.


@pytest.mark.parametrize("ignored", [False, True])
def test_a_document_that_was_given_up_is_revoked_by_whoever_puts_it_together(
    monkeypatch: pytest.MonkeyPatch, ignored: bool
) -> None:
    class Revoked:
        def combine(self, task_id: str) -> None:
            assert task_id == ID
            raise TaskRevokedError("expired")

    told = Mock()
    monkeypatch.setattr(parts.combine, "_backend", told)
    monkeypatch.setattr(parts, "_server", Revoked())
    parts.combine.push_request(id=ID, task=keys.COMBINE_TASK, ignore_result=ignored)
    try:
        with pytest.raises(Ignore):
            parts.combine.run()
        request = parts.combine.request
    finally:
        parts.combine.pop_request()
    told.mark_as_revoked.assert_called_once_with(ID, "expired", request, store_result=not ignored)


BARE = sent()
