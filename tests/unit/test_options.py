"""Celery's options of a call: what the fleet cannot follow is refused before anything is sent."""

from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import celery
import numpy as np
import pytest
from kombu import Exchange, Queue

from sutra_tasks import InvalidInputError, InvalidOptionError, keys
from sutra_tasks.client.embed_task import embed
from sutra_tasks.client.options import check_callbacks, check_options
from sutra_tasks.settings import Settings, settings

NOW = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)
LIMITS = Settings()
queued = celery.signature("project.save", queue="project")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("serializer", "pickle"),
        ("serializer", "yaml"),
        ("serializer", "msgpack"),
        ("compression", "zstd"),
        ("compression", "brotli"),
        ("compression", "no such"),
        ("compression", 5),
        ("priority", -1),
        ("priority", 10),
        ("priority", "3"),
        ("priority", 1.5),
        ("priority", True),
        ("countdown", "10"),
        ("countdown", timedelta(seconds=1)),
        ("countdown", Decimal(5)),
        ("countdown", float("nan")),
        ("countdown", float("inf")),
        ("countdown", 10**400),
        ("countdown", True),
        ("eta", "soon"),
        ("eta", 5),
        ("eta", date(2030, 1, 2)),
        ("expires", "later"),
        ("expires", timedelta(seconds=1)),
        ("expires", float("inf")),
        ("expires", [5]),
        ("queue", "other"),
        ("queue", Queue("other")),
        ("routing_key", "other"),
        ("exchange", "other"),
        ("exchange", Exchange("other")),
        ("task_id", 7),
        ("task_id", ["a"]),
        ("task_id", ""),
        ("task_id", "x" * 201),
        ("shadow", 7),
        ("root_id", 7),
        ("reply_to", b"queue"),
        ("ignore_result", "yes"),
        ("retry_policy", 3),
        ("content_type", "application/x-python-serialize"),
        ("content_encoding", "binary"),
        ("expiration", "soon"),
        ("headers", "tenant"),
        ("headers", {"id": "mine"}),
        ("headers", {"task": "other"}),
        ("headers", {"what": object()}),
        ("prompt", "query"),
        ("model", "small"),
        ("details", True),
    ],
)
def test_an_option_that_cannot_work_is_refused_by_name(option: str, value: Any) -> None:
    with pytest.raises(InvalidOptionError) as refused:
        check_options({option: value})
    assert refused.value.option == option
    assert str(refused.value)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"serializer": None, "queue": None, "priority": None, "countdown": None},
        {"serializer": "json", "compression": "zlib"},
        {"compression": "lzma"},
        {"priority": 0},
        {"priority": np.int64(9)},
        {"countdown": 5, "expires": 7.5},
        {"countdown": -1},  # Celery runs what is overdue at once
        {"eta": NOW, "expires": NOW},
        {"eta": NOW.isoformat(), "expires": NOW.isoformat()},  # as canvases pass them on
        {"queue": keys.EMBED_QUEUE, "exchange": "", "routing_key": keys.EMBED_QUEUE},
        {"queue": Queue(keys.EMBED_QUEUE)},
        {"queue": keys.device_queue("gpu0")},  # sutra_tasks.routing.direct
        {"task_id": "mine", "shadow": "shown", "headers": {"tenant": 7, "at": NOW}},
        {"ignore_result": True, "retry": False, "argsrepr": "()"},
    ],
)
def test_an_option_that_works_is_taken(options: dict[str, Any]) -> None:
    check_options(options)


@pytest.mark.parametrize("callback", ["save", 5, {"no": "task"}, [queued, "save"]])
@pytest.mark.parametrize("option", ["link", "link_error"])
def test_a_callback_that_is_no_signature_is_refused(option: str, callback: Any) -> None:
    with pytest.raises(InvalidOptionError, match="signature") as refused:
        check_callbacks({option: callback}, LIMITS)
    assert refused.value.option == option


@pytest.mark.parametrize(
    "signature",
    [
        embed.s().set(priority=-1),
        embed.s().set(serializer="pickle"),
        embed.s(dimensions="8"),
        embed.s(no_such=1),
        embed.si(["a", None]),
        celery.chain(queued, embed.s(dimensions=0)),
        celery.group(queued, embed.si(5)),
        celery.chord([embed.si("a"), embed.si(b"b")], body=queued),
    ],
)
@pytest.mark.parametrize("option", ["link", "chain", "chord"])
def test_a_call_that_follows_is_checked_before_the_first_is_sent(option: str, signature: Any) -> None:
    with pytest.raises(InvalidInputError):
        check_callbacks({option: [signature]}, LIMITS)


@pytest.mark.parametrize("option", ["link", "chain", "chord"])
def test_a_call_that_follows_has_texts_of_its_own_or_those_before_it(option: str) -> None:
    with pytest.raises(InvalidInputError, match=r"embed\.si\(texts\)"):
        check_callbacks({option: [embed.s("of its own")]}, LIMITS)


@pytest.mark.parametrize(
    "signature", [embed.s(), embed.s(dimensions=8), embed.si("of its own"), embed.s().set(priority=3)]
)
def test_a_call_that_can_follow_is_taken(signature: Any) -> None:
    check_callbacks({"link": signature, "chain": [signature]}, LIMITS)


@pytest.mark.parametrize("method", ["map", "starmap", "chunks"])
def test_what_would_loop_in_one_worker_is_refused_with_what_to_write(method: str) -> None:
    with pytest.raises(InvalidInputError, match=rf"embed\.{method}.*embed_many"):
        getattr(embed, method)(["a", "b"], 1)


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SUTRA_BROKER_URL", "redis://127.0.0.1:1/0")
    settings.cache_clear()
    yield
    settings.cache_clear()


@pytest.mark.usefixtures("configured")
@pytest.mark.parametrize(
    "send",
    [
        lambda: embed.apply_async(("a",), serializer="pickle"),
        lambda: embed.s("a").set(queue="other").apply_async(),
        lambda: embed.signature(("a",), countdown="5").apply_async(),
        lambda: celery.group([embed.s("a").set(priority=-1)]).apply_async(),
        (embed.s("a") | embed.s().set(priority=-1)).apply_async,
        lambda: embed.apply_async(("a",), link=embed.s().set(eta="soon")),
    ],
)
def test_every_way_to_send_a_call_checks_its_options(send: Any) -> None:
    with pytest.raises(InvalidOptionError):  # and not that the server does not answer
        send()


@pytest.mark.usefixtures("configured")
def test_an_option_of_embed_among_celerys_is_told_where_it_goes() -> None:
    with pytest.raises(InvalidOptionError, match=r"apply_async\(\(texts,\), \{'prompt': \.\.\.\}\)"):
        embed.apply_async(("a",), prompt="query")
