"""What ``embed`` sends, and what it refuses to send."""

import json
from collections.abc import Iterator
from typing import Any

import celery
import pytest
import redis
from kombu.exceptions import OperationalError

from sutra_tasks import (
    BrokerNotConfiguredError,
    CallbackQueueError,
    InvalidTextError,
    ServerUnavailableError,
    SutraError,
)
from sutra_tasks.app import app
from sutra_tasks.client.call import demand_of
from sutra_tasks.client.embed_task import embed, serve
from sutra_tasks.settings import settings

save = celery.signature("project.save")
notify = celery.signature("project.notify")
queued = celery.signature("project.save", queue="project")


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SUTRA_BROKER_URL", "redis://127.0.0.1:1/0")
    settings.cache_clear()
    yield
    settings.cache_clear()


@pytest.fixture
def sent(configured: None, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The messages that are given to Celery, in place of a broker."""
    calls: list[dict[str, Any]] = []

    def capture(_: object, args: Any = None, kwargs: Any = None, **options: Any) -> None:
        calls.append({"args": args, "kwargs": kwargs, **options})

    monkeypatch.setattr(celery.Task, "apply_async", capture)
    return calls


def test_without_a_broker_the_variable_and_a_way_to_start_one_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SUTRA_BROKER_URL", raising=False)
    settings.cache_clear()
    with pytest.raises(BrokerNotConfiguredError, match=r"SUTRA_BROKER_URL=redis://.*`sutra up`"):
        embed.delay("text")
    settings.cache_clear()


def test_bad_input_is_told_before_a_missing_broker(sent: list[Any]) -> None:
    with pytest.raises(InvalidTextError):
        embed.delay(["text", None])  # type: ignore[list-item]
    assert not sent


@pytest.mark.parametrize("error", [OperationalError(), redis.ConnectionError(), redis.TimeoutError()])
def test_a_server_that_does_not_answer_is_one_error(
    configured: None, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(celery.Task, "apply_async", fail)
    with pytest.raises(ServerUnavailableError) as told:
        embed.delay("text")
    assert told.value.reason == type(error).__name__


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        (("a",), {}, "a"),
        ((["a", "b"],), {}, ["a", "b"]),
        ((("a", "b"),), {}, ["a", "b"]),
        ((), {"texts": ["a"]}, ["a"]),
        (([],), {}, []),
    ],
)
def test_texts_are_sent_as_the_one_argument(
    sent: list[dict[str, Any]], args: Any, kwargs: Any, expected: Any
) -> None:
    embed.apply_async(args, kwargs | {"dimensions": 8})
    assert sent[0]["args"] == (expected,)
    assert sent[0]["kwargs"] == {"dimensions": 8}


def test_a_message_shows_no_text_outside_its_body(sent: list[dict[str, Any]]) -> None:
    embed.apply_async((["secret", "secreté"],), headers={"tenant": 7}, priority=3)
    call = sent[0]
    del call["args"]
    assert call["argsrepr"] == "(<2 texts, 14 bytes>,)"
    assert "secret" not in json.dumps(call)
    assert (call["headers"]["tenant"], call["priority"]) == (7, 3)


def test_a_message_tells_the_router_what_it_holds(sent: list[dict[str, Any]]) -> None:
    given = {"tenant": 7}
    embed.apply_async((["a", "é"],), strategy="round_robin", headers=given)
    demand = demand_of(json.loads(json.dumps(sent[0]["headers"]["sutra"])), 0)
    assert (demand.texts, demand.bytes, demand.strategy) == (2, 3, "round_robin")
    assert demand.sent_at is not None
    assert given == {"tenant": 7}


@pytest.mark.parametrize(
    "signature",
    [embed.s("a"), embed.si("a"), embed.signature(("a",)), embed.s()],
)
def test_a_signature_names_the_fleets_queue(signature: Any) -> None:
    assert signature.options["queue"] == "sutra.embed"
    assert celery.signature(json.loads(json.dumps(signature)))["options"]["queue"] == "sutra.embed"


def test_a_signature_keeps_a_queue_of_its_own() -> None:
    assert embed.signature(("a",), queue="other").options["queue"] == "other"
    assert embed.s("a").set(queue="other").options["queue"] == "other"


@pytest.mark.parametrize(
    ("callback", "named"),
    [
        (save, "project.save"),
        ([queued, save], "project.save"),
        ((save,), "project.save"),
        (dict(save), "project.save"),
        (celery.chain(queued, notify), "project.notify"),
        (celery.chain(embed.s(), celery.chain(queued, save)), "project.save"),
        (celery.group(queued, notify), "project.notify"),
        (celery.chord([queued], body=notify), "project.notify"),
        (celery.chord([save], body=queued), "project.save"),
        (celery.chord(celery.group(queued, save), body=queued), "project.save"),
    ],
)
def test_a_callback_without_a_queue_is_refused_by_name(
    sent: list[Any], callback: Any, named: str
) -> None:
    with pytest.raises(CallbackQueueError, match="queue=") as refused:
        embed.apply_async(("a",), link=callback)
    assert (refused.value.task, refused.value.option) == (named, "link")
    assert not sent


@pytest.mark.parametrize("option", ["link", "link_error", "chain", "chord"])
def test_every_way_to_a_callback_is_checked(sent: list[dict[str, Any]], option: str) -> None:
    send: Any = embed.apply_async
    with pytest.raises(CallbackQueueError) as refused:
        send(("a",), **{option: [queued, save]})
    assert refused.value.option == option
    send(("a",), **{option: [queued]})
    assert [call[option] for call in sent] == [[queued]]


@pytest.mark.parametrize(
    "callback",
    [
        None,
        [],
        queued,
        dict(queued),
        [queued, queued],
        celery.signature("project.save", exchange="project"),
        embed.s(),
        celery.signature("celery.accumulate"),
        celery.chain(queued, embed.s()),
        celery.group(queued, queued),
        celery.chord([queued, embed.s("b")], body=queued),
    ],
)
def test_a_callback_with_a_queue_is_passed_on(sent: list[dict[str, Any]], callback: Any) -> None:
    embed.apply_async(("a",), link=callback)
    assert sent[0]["link"] == callback


def test_a_chain_is_checked_where_it_is_called(sent: list[dict[str, Any]]) -> None:
    with pytest.raises(CallbackQueueError):
        (embed.s("a") | save).apply_async()
    with pytest.raises(CallbackQueueError):
        embed.s("a").on_error(save).apply_async()
    assert not sent
    (embed.s("a") | queued).apply_async()
    assert [step["task"] for step in sent[0]["chain"]] == ["project.save"]


def test_the_body_runs_only_where_it_is_served() -> None:
    with pytest.raises(SutraError, match="local_fleet"):
        embed("text")
    serve(lambda call: call.texts)  # type: ignore[arg-type, return-value]
    try:
        assert embed(["a", "b"]) == ("a", "b")
        with pytest.raises(InvalidTextError):  # a message of another client is checked here
            embed([None])
    finally:
        serve(None)


def test_the_app_leaves_the_process_to_others() -> None:
    assert not app.set_as_current
    other = celery.Celery("project", set_as_current=False)
    other.finalize()
    assert "celery.chord" in other.tasks
    assert embed.name in app.tasks
    assert embed.name not in other.tasks
