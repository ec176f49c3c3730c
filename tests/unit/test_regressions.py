"""Bugs that were, each with its smallest reproduction."""

import json
from contextlib import suppress
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import celery
import fakeredis
import numpy as np
import pytest
import redis
from kombu.utils import json as kombu_json

from sutra_tasks.batching.batcher import Batcher
from sutra_tasks.batching.jobs import TextError
from sutra_tasks.batching.next_batch import Limits
from sutra_tasks.client.call import demand_of
from sutra_tasks.client.embed_task import embed
from sutra_tasks.engines.simulated_engine import SimulatedEncoder
from sutra_tasks.errors import CorruptResultError, SettingsError
from sutra_tasks.membership.fleet import FleetMember
from sutra_tasks.routing import fleet_view
from sutra_tasks.routing.router import Router
from sutra_tasks.settings import Settings, settings
from sutra_tasks.testing import local_fleet, vectors_of
from sutra_tasks.vectors import Vectors

travel: Any = kombu_json  # untyped
START = 2_000_000_000.0


@pytest.mark.parametrize("kwargs", [{"body": "Done"}, {"tasks": ["a", "b"]}, {"header": 1}])
def test_a_callback_may_have_arguments_of_any_name(
    monkeypatch: pytest.MonkeyPatch, kwargs: dict[str, Any]
) -> None:
    # TypeError: _callbacks_without_queue takes them for the parts of a chain or chord.
    monkeypatch.setenv("SUTRA_BROKER_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setattr(celery.Task, "apply_async", lambda *_, **__: None)
    settings.cache_clear()
    try:
        mail = celery.signature("project.mail", kwargs=kwargs, queue="project")
        embed.apply_async(("text",), link=mail)
    finally:
        settings.cache_clear()


def test_subtask_is_a_signature_too() -> None:
    # Celery's alias `subtask = signature` still means the base class's.
    assert embed.subtask(("a",)).options.get("queue") == "sutra.embed"


def test_a_local_fleet_inside_another_leaves_it_working() -> None:
    # serve(None) on leaving: the outer fleet (a session's fixture, say) answers no more.
    with local_fleet(width=8):
        with local_fleet(width=4):
            pass
        assert embed.delay("a").get(timeout=10).shape == (8,)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_rows_of_the_wrong_shape_do_not_end_the_batcher(monkeypatch: pytest.MonkeyPatch) -> None:
    # IndexError (or ValueError) outside _encode's try ends the thread: every later task of a device
    # that still sends heartbeats hangs. The same for an exception of on_batch.
    encoder = SimulatedEncoder(width=4)
    monkeypatch.setattr(encoder, "encode", lambda _: vectors_of([], 4))
    batcher = Batcher(Limits(max_tokens=100, max_texts=8, max_wait_s=0))
    batcher.start()
    future = batcher.submit(encoder.tokenize(["a"], None), encoder=encoder)
    assert isinstance(future.exception(timeout=0.2), TextError)
    batcher.close(timeout_s=5)


class Message:
    def __init__(self, forwarded: list[Any], **headers: Any) -> None:
        self.headers = {"id": str(uuid4()), "task": "sutra.embed", **headers}
        self.body = ""
        self.channel = SimpleNamespace(forward=lambda message, _: forwarded.append(message))


@pytest.mark.parametrize(
    ("headers", "fails"),
    [
        ({"expires": "tomorrow"}, False),  # ValueError, if a message with it came so far
        ({"sutra": {"v": 1, "sent_at": -(10**400)}}, False),  # OverflowError in waited_s
        ({}, True),  # fleet_members raises: the server is busy, the router's client has no connection
    ],
)
def test_a_tick_that_fails_forgets_no_message(
    monkeypatch: pytest.MonkeyPatch, headers: dict[str, Any], fails: bool
) -> None:
    # tick() empties self._waiting before it looks at it; kombu's timer logs the error and goes on,
    # and every message that waited stays in flight and untold until the connection is lost.
    now = [START]
    found: list[FleetMember] = []
    failing = False

    def look(_: object) -> list[FleetMember]:
        if failing:
            raise redis.ResponseError("BUSY")
        return found

    monkeypatch.setattr(fleet_view, "fleet_members", look)
    client = fakeredis.FakeRedis(server=fakeredis.FakeServer())
    router = Router(
        Settings(), client, "r", incarnation="~.1", now=lambda: now[0], monotonic=lambda: now[0]
    )
    router.attach(SimpleNamespace(hostname="h", event_dispatcher=None, connection_errors=()))
    forwarded: list[Any] = []
    poison, good = Message(forwarded, **headers), Message(forwarded)
    router.route(poison)
    router.route(good)
    failing = fails
    for _ in range(3):
        now[0] += 0.125
        with suppress(Exception):  # as kombu's timer does
            router.tick()
        failing = False
        found[:] = [FleetMember("a", 0.0, None)]
    assert good in forwarded


@pytest.mark.parametrize("sent_at", ["NaN", "-Infinity"])
def test_a_time_that_is_no_number_counts_as_missing(sent_at: str) -> None:
    # NaN compares false with the router's patience, so such a task waits forever; -Infinity ends as
    # waited_s=Infinity in the stored error, which is no JSON outside Python.
    header = json.loads(f'{{"v": 1, "sent_at": {sent_at}}}')
    assert demand_of(header, 0).sent_at is None


def test_settings_do_not_show_a_password() -> None:
    # app.conf.sutra_settings is printed by `celery report` and `inspect report`.
    options = Settings(broker_url="redis://:hunter2@host", result_url="redis://:hunter2@host")
    assert "hunter2" not in repr(options)


def test_a_password_before_the_scheme_is_not_told() -> None:
    with pytest.raises(SettingsError) as refused:
        Settings(broker_url=":hunter2@redis://host")
    assert "hunter2" not in str(refused.value)


def test_an_unknown_strategy_is_refused_where_it_is_set() -> None:
    # Today the router starts, and every task fails with InvalidOptionError.
    with pytest.raises(SettingsError, match="SUTRA_STRATEGY"):
        Settings(strategy="fastest")


@pytest.mark.parametrize("shape", [[10**30, 0], [0, 2**62]])
def test_a_corrupt_record_of_any_shape_is_refused_as_corrupt(shape: list[int]) -> None:
    # ValueError of numpy: no bytes are 4 * 10**30 * 0 bytes.
    record = {"v": 1, "shape": shape, "data": ""}
    with pytest.raises(CorruptResultError):
        travel.loads(travel.dumps({"__type__": "sutra.vectors", "__value__": record}))


def test_what_is_derived_and_not_float32_shows_its_numbers_and_does_not_travel() -> None:
    found = Vectors.of(np.array([3, 1, 2], dtype=np.float32)).argsort()
    assert repr(found) == repr(np.asarray(found))
    with pytest.raises(TypeError, match="int64"):
        travel.dumps(found)


def test_vectors_changed_in_place_still_travel() -> None:
    vectors = Vectors.of(np.array([3, 4], dtype=np.float32))
    vectors /= np.float32(5)
    assert travel.loads(travel.dumps(vectors)).tolist() == pytest.approx([0.6, 0.8])
