"""The router: every message is passed on, kept until a device lives, failed or revoked."""

import itertools
import json
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import fakeredis
import pytest
import redis

from sutra_tasks import keys
from sutra_tasks.broker.dead_letters import dead_letters
from sutra_tasks.broker.queues import lane
from sutra_tasks.broker.result_backend import RequeueMessage
from sutra_tasks.client.admission import Backlog
from sutra_tasks.errors import (
    InvalidOptionError,
    NoHealthyWorkersError,
    PoisonMessageError,
    ResultRefusedError,
    UnsupportedVersionError,
)
from sutra_tasks.health.states import DeviceState
from sutra_tasks.membership.fleet import FleetMember
from sutra_tasks.routing import fleet_view
from sutra_tasks.routing import router as module
from sutra_tasks.routing.router import Router
from sutra_tasks.settings import Settings
from tests.records import record

if TYPE_CHECKING:
    from sutra_tasks.membership.device_record import DeviceRecord

START = 2_000_000_000.0  # later than any real clock, so that what expires "now" has expired
LONG_AGO = "2001-09-09T01:46:40+00:00"


class Message:
    """A delivery on a channel that records what is forwarded."""

    content_type, content_encoding, delivery_info = (
        "application/json",
        "utf-8",
        {"routing_key": "q"},
    )

    def __init__(self, world: "World", **headers: Any) -> None:
        self.headers = {"id": str(uuid4()), "task": "sutra.embed", **headers}
        self.body = "[[],{},{}]"
        self.payload: Any = ([], {}, {})
        self.properties: dict[str, Any] = {}
        self.acknowledged = 0
        self.sutra_raw = json.dumps(self.headers).encode()
        self.channel = SimpleNamespace(forward=lambda m, device: world.forwarded.append((m, device)))

    def ack_log_error(self, *_: Any, **__: Any) -> None:
        self.acknowledged += 1

    reject_log_error = ack_log_error


class World:
    """A router with a clock, a fleet and a result store that a test holds in its hand."""

    def __init__(self, **options: Any) -> None:
        self.now = START
        self.ages: dict[str, float] = {}
        self.said: dict[str, DeviceRecord] = {}
        self.loads: dict[str, tuple[int, int, int]] = {}
        self.forwarded: list[tuple[Message, str]] = []
        self.failed: dict[str, Exception] = {}
        self.revoked: dict[str, str] = {}
        self.client = fakeredis.FakeRedis(server=fakeredis.FakeServer())
        self.router = Router(
            Settings(**{"strategy": "round_robin", "no_device_wait_s": 30, **options}),
            self.client,
            "router1",
            incarnation="~.1",
            now=lambda: self.now,
            monotonic=lambda: self.now,
        )
        self.backend = SimpleNamespace(
            mark_as_failure=lambda task_id, error, **_: self.failed.update({task_id: error}),
            mark_as_revoked=lambda task_id, reason, **_: self.revoked.update({task_id: reason}),
        )
        app = SimpleNamespace(backend=self.backend)
        self.router.attach(SimpleNamespace(app=app, event_dispatcher=None, connection_errors=()))

    def seen(self) -> list[FleetMember]:
        return [
            FleetMember(name, age, self.said.get(name), *self.loads.get(name, ()))
            for name, age in sorted(self.ages.items())
        ]

    def add(self, name: str, *, load: tuple[int, int, int] = (0, 0, 0), **facts: Any) -> None:
        """Let a device say something of itself; its load is messages, tokens and credit."""
        self.ages[name], self.loads[name] = 0.0, load
        self.said[name] = record(name, **{"tokens_per_s": 1000.0, "credit_tokens": 1000, **facts})

    def stored(self, key: str) -> Any:
        value: Any = self.client.get(key)
        return None if value is None else json.loads(value)

    def route(self, *messages: Message) -> None:
        for message in messages:
            self.router.route(message)

    def tick(self, after_s: float = 0.125) -> None:
        self.now += after_s
        self.router.tick()

    @property
    def devices(self) -> list[str]:
        return [device for _, device in self.forwarded]


@pytest.fixture
def make_world(monkeypatch: pytest.MonkeyPatch) -> Callable[..., World]:
    """Make a world with settings of its own; the last one made is the one that is seen."""

    def make(**options: Any) -> World:
        world = World(**options)
        monkeypatch.setattr(fleet_view, "fleet_members", lambda _: world.seen())
        return world

    return make


@pytest.fixture
def world(make_world: Callable[..., World]) -> World:
    return make_world()


def test_messages_are_dealt_to_live_devices_in_turn(world: World) -> None:
    world.ages = {"b": 0, "a": 5.9, "dead": 6.1}
    messages = [Message(world) for _ in range(5)]
    world.route(*messages)
    assert [message for message, _ in world.forwarded] == messages
    assert world.devices == ["a", "b", "a", "b", "a"]
    assert not any(message.acknowledged for message in messages)  # forwarding settles them


def test_work_waits_for_a_device_and_then_goes_to_it_in_order(world: World) -> None:
    messages = [Message(world) for _ in range(3)]
    world.route(*messages)
    world.tick()
    assert not world.forwarded
    world.ages = {"a": 0.0}
    world.tick()
    assert [message for message, _ in world.forwarded] == messages
    world.tick()
    assert len(world.forwarded) == 3


def test_work_fails_once_no_device_lived_for_long_enough(world: World) -> None:
    world.ages = {"dead": 31.0}
    message = Message(world)
    world.route(message)
    world.tick(29.875)
    assert not world.failed
    world.tick(0.25)
    error = world.failed[message.headers["id"]]
    assert isinstance(error, NoHealthyWorkersError)
    assert (error.known, error.oldest_heartbeat_s, error.waited_s) == (1, 31.0, 30.1)
    assert message.acknowledged == 1
    world.tick()
    assert message.acknowledged == 1


def test_a_backlog_waits_as_long_as_any_other_when_an_outage_begins(world: World) -> None:
    old = Message(world, sutra={"v": 1, "sent_at": START - 3600})
    world.route(old)
    world.tick(29.875)
    assert not world.failed
    new = Message(world, sutra={"v": 1, "sent_at": world.now})
    world.route(new)
    world.tick(0.25)
    assert list(world.failed) == [old.headers["id"]]
    world.tick(30)
    assert list(world.failed) == [old.headers["id"], new.headers["id"]]


def test_an_outage_ends_with_the_first_device(world: World) -> None:
    world.tick()
    world.route(Message(world))
    world.ages = {"a": 0.0}
    world.tick(29)
    world.ages = {}
    old = Message(world, sutra={"v": 1, "sent_at": START})
    world.tick()
    world.route(old)
    world.tick(29)
    assert not world.failed
    world.tick(2)
    assert list(world.failed) == [old.headers["id"]]


@pytest.mark.parametrize("expires", [LONG_AGO, LONG_AGO.removesuffix("+00:00")])
def test_work_that_expires_while_it_waits_is_revoked(world: World, expires: str) -> None:
    expired, other = Message(world, expires=expires), Message(world, expires="2100-01-01T00:00:00Z")
    world.route(expired, other)
    world.tick()
    assert world.revoked == {expired.headers["id"]: "expired"}
    assert (expired.acknowledged, other.acknowledged) == (1, 0)
    world.ages = {"a": 0.0}
    world.tick()
    assert [message for message, _ in world.forwarded] == [other]


def test_revoked_work_goes_nowhere(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.ages = {"a": 0.0}
    message = Message(world)
    revoked = {message.headers["id"]}
    monkeypatch.setattr("celery.worker.state.revoked", revoked)
    world.route(message)
    assert not world.forwarded
    assert world.revoked == {message.headers["id"]: "revoked"}


@pytest.mark.parametrize(
    ("header", "kind"),
    [({"v": 2}, UnsupportedVersionError), ({"v": 1, "strategy": "fastest"}, InvalidOptionError)],
)
@pytest.mark.parametrize("ages", [{}, {"a": 0.0}])
def test_what_can_never_be_routed_fails_at_once(
    world: World, header: Any, kind: type[Exception], ages: dict[str, float]
) -> None:
    world.ages = ages
    message, good = Message(world, sutra=header), Message(world)
    world.route(message, good)
    assert [type(error) for error in world.failed.values()] == [kind]
    assert message.acknowledged == 1
    assert len(world.forwarded) == len(ages)


def test_a_new_connection_begins_with_nothing_waiting(world: World) -> None:
    world.route(Message(world))
    world.router.attach(SimpleNamespace())
    world.ages = {"a": 0.0}
    world.tick()
    assert not world.forwarded


def test_the_fleet_is_read_once_in_a_while(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []

    def read(client: object) -> list[FleetMember]:
        reads.append(client)
        return [FleetMember("a", 0.0, None)]

    monkeypatch.setattr(fleet_view, "fleet_members", read)
    world.route(*(Message(world) for _ in range(100)))
    assert len(reads) == 1
    world.now += 0.125
    world.route(Message(world))
    assert len(reads) == 2


def test_a_router_reports_what_it_does_and_for_how_long_that_holds(world: World) -> None:
    world.route(Message(world))
    world.tick()
    record = world.stored(keys.router("~.1"))
    assert 5000 < world.client.pttl(keys.router("~.1")) <= 6000
    assert {"v": 1, "routed": 0, "waiting": 1, "incarnation": "~.1"}.items() <= record.items()


# --- what workers died of ------------------------------------------------------------------------


@pytest.mark.parametrize("alive", [True, False])
def test_a_message_that_killed_its_workers_is_kept_and_its_task_fails(world: World, alive: bool) -> None:
    if alive:
        world.add("a")
    message = Message(world, sutra_attempts=3)
    world.route(message)
    error = world.failed[message.headers["id"]]
    assert isinstance(error, PoisonMessageError)
    assert error.attempts == 3
    assert message.acknowledged == 1
    assert not world.forwarded
    [letter] = dead_letters(world.client)
    assert (letter.task_id, letter.attempts, letter.at) == (message.headers["id"], 3, START)
    assert (letter.reason, letter.message.encode()) == (error.reason, message.sutra_raw)


@pytest.mark.parametrize(
    ("most", "attempts", "given_up"), [(3, 2, False), (3, 4, True), (1, 1, True), (1, 0, False)]
)
def test_a_message_may_kill_so_many_workers(
    make_world: Callable[..., World], most: int, attempts: int, given_up: bool
) -> None:
    world = make_world(max_attempts=most)
    world.add("a")
    world.route(Message(world, sutra_attempts=attempts))
    assert len(world.forwarded) == (not given_up)
    assert len(dead_letters(world.client)) == given_up


def test_a_message_that_cannot_be_kept_is_not_failed_and_tried_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise redis.ConnectionError

    world.add("a")
    message, other = Message(world, sutra_attempts=3), Message(world)
    with monkeypatch.context() as away:
        away.setattr(module, "add_dead_letter", refuse)
        world.route(message, other)
        world.tick()
    assert (world.failed, message.acknowledged) == ({}, 0)
    assert [one for one, _ in world.forwarded] == [other]
    world.tick(0.25)
    assert message.acknowledged == 1
    assert len(dead_letters(world.client)) == 1


@pytest.mark.parametrize("error", [RequeueMessage("away"), redis.ConnectionError()])
def test_a_task_whose_failure_cannot_be_stored_is_tried_again(
    world: World, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    world.add("a")
    message, other = Message(world, sutra={"v": 99}), Message(world)
    with monkeypatch.context() as away:
        away.setattr(world.backend, "mark_as_failure", refuse)
        world.route(message, other)
        world.tick()
    assert message.acknowledged == 0
    assert [one for one, _ in world.forwarded] == [other]
    world.tick(0.25)
    assert list(world.failed) == [message.headers["id"]]
    world.tick()
    assert message.acknowledged == 1


def test_tries_come_less_and_less_often(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def refuse(*_: Any, **__: Any) -> None:
        tried.append(world.now - START)
        raise RequeueMessage("away")

    monkeypatch.setattr(world.backend, "mark_as_failure", refuse)
    world.route(Message(world, sutra={"v": 99}))
    for _ in range(8 * 60):
        world.tick()
    pauses = [after - before for before, after in itertools.pairwise(tried)]
    assert pauses == sorted(pauses)
    assert pauses[0] <= 0.25
    assert 1.5 < pauses[-1] <= 2.25


def test_a_message_that_waits_for_a_server_delays_no_other(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RequeueMessage("away")

    world.add("a")
    monkeypatch.setattr(world.backend, "mark_as_failure", refuse)
    world.route(Message(world, sutra={"v": 99}))
    assert world.router.may_take(keys.EMBED_QUEUE)


def test_a_failure_that_can_never_be_told_becomes_a_dead_letter(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: list[Exception] = [ResultRefusedError("NOPERM"), TypeError("callback")]

    def refuse(*_: Any, **__: Any) -> None:
        raise errors.pop()

    monkeypatch.setattr(world.backend, "mark_as_failure", refuse)
    messages = [Message(world, sutra={"v": 99}) for _ in range(2)]
    world.route(*messages)
    assert [message.acknowledged for message in messages] == [1, 1]
    letters = {letter.task_id: letter.reason for letter in dead_letters(world.client)}
    assert letters.keys() == {message.headers["id"] for message in messages}
    assert all("NOPERM" in reason or "callback" in reason for reason in letters.values())


def test_a_message_that_this_code_fails_with_is_given_up_like_one_that_kills_workers(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    world.add("a")
    message = Message(world)
    with monkeypatch.context() as broken:
        broken.setattr(module, "decide", fail)
        world.route(message)
        for _ in range(8):
            world.tick(0.5)
    assert isinstance(world.failed[message.headers["id"]], PoisonMessageError)
    assert [letter.task_id for letter in dead_letters(world.client)] == [message.headers["id"]]


# --- between two looks at the fleet --------------------------------------------------------------


def sized(world: World, tokens: int) -> Message:
    return Message(world, sutra={"v": 1, "texts": 0, "bytes": 4 * tokens})


def test_a_burst_is_spread_by_what_was_sent_since_the_last_look(
    make_world: Callable[..., World],
) -> None:
    world = make_world(strategy="shortest_finish")
    world.add("a", tokens_per_s=3000.0, credit_tokens=10**6)
    world.add("b", tokens_per_s=1000.0, credit_tokens=10**6)
    world.route(*(sized(world, 100) for _ in range(40)))
    shares = Counter(world.devices)
    assert shares["a"] + shares["b"] == 40
    assert 28 <= shares["a"] <= 32


def test_the_next_look_knows_better(make_world: Callable[..., World]) -> None:
    world = make_world(strategy="shortest_finish")
    world.add("a", credit_tokens=10**6)
    world.add("b", load=(9, 900, 900), credit_tokens=10**6)
    world.route(*(sized(world, 100) for _ in range(6)))
    assert world.devices == ["a"] * 6
    world.add("a", load=(9, 900, 900), credit_tokens=10**6)
    world.add("b", credit_tokens=10**6)
    world.now += 0.125
    world.route(*(sized(world, 100) for _ in range(6)))
    assert world.devices == ["a"] * 6 + ["b"] * 6


def test_a_burst_keeps_to_the_credit_of_each_device(world: World) -> None:
    world.add("a", credit_tokens=300)
    world.add("b", credit_tokens=1000)
    world.route(*(sized(world, 100) for _ in range(13)))
    assert Counter(world.devices) == {"a": 3, "b": 10}


def test_large_messages_taken_at_once_do_not_pile_up_before_a_device(world: World) -> None:
    world.add("a", credit_tokens=3000)
    world.route(*(sized(world, 8000) for _ in range(5)))
    assert world.devices == ["a"] * 3  # each uses as much credit as one message may
    assert not world.router.may_take(keys.EMBED_QUEUE)
    world.add("a", load=(2, 16_000, 2048), credit_tokens=3000)
    world.tick()
    assert world.devices == ["a"] * 4
    world.add("a", credit_tokens=3000)
    assert not world.router.may_take(keys.EMBED_QUEUE)  # what waits goes first
    world.tick()
    assert world.devices == ["a"] * 5
    assert world.router.may_take(keys.EMBED_QUEUE)


# --- whether to take more ------------------------------------------------------------------------

FULL = (1, 1000, 1000)


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        ({}, True),  # it waits, or fails, where somebody sees it
        ({"a": {}}, True),
        ({"a": {"load": FULL}}, False),
        ({"a": {"load": (1, 999, 999)}}, True),
        ({"a": {"load": FULL}, "b": {"load": FULL}}, False),
        ({"a": {"load": FULL}, "b": {}}, True),
        ({"a": {"load": FULL}, "b": {"state": DeviceState.DEGRADED}}, True),
        # Who is unhealthy gets no work while others stand.
        ({"a": {"load": FULL}, "b": {"state": DeviceState.UNHEALTHY}}, False),
        ({"a": {"load": FULL}, "b": {"state": DeviceState.PROBING}}, False),
        ({"a": {"state": DeviceState.UNHEALTHY}}, True),
        ({"a": {"state": DeviceState.UNHEALTHY, "load": FULL}}, False),
        ({"a": {"state": DeviceState.STARTING, "load": FULL}}, True),
        ({"a": {"state": DeviceState.REFUSED, "load": FULL}}, True),
    ],
)
def test_texts_are_taken_unless_every_device_that_stands_has_enough(
    world: World, devices: dict[str, Any], expected: bool
) -> None:
    for name, facts in devices.items():
        world.add(name, **facts)
    assert world.router.may_take(keys.EMBED_QUEUE) == expected
    assert world.router.may_take(keys.CONTROL_QUEUE)


def test_a_device_that_died_keeps_no_texts_out(world: World) -> None:
    world.add("a", load=FULL)
    world.ages["a"] = 7.0
    assert world.router.may_take(keys.EMBED_QUEUE)


def test_a_device_of_another_version_keeps_no_texts_out(world: World) -> None:
    world.add("a", load=FULL)
    world.ages["b"] = 0.0
    assert world.router.may_take(keys.EMBED_QUEUE)


def test_what_was_sent_since_the_last_look_counts_against_credit(world: World) -> None:
    world.add("a", credit_tokens=300)
    for _ in range(3):
        assert world.router.may_take(keys.EMBED_QUEUE)
        world.route(sized(world, 100))
    assert not world.router.may_take(keys.EMBED_QUEUE)
    world.now += 0.125  # it has done all that
    assert world.router.may_take(keys.EMBED_QUEUE)


def test_without_a_server_to_ask_texts_are_taken(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> list[FleetMember]:
        raise redis.ConnectionError

    monkeypatch.setattr(fleet_view, "fleet_members", fail)
    assert world.router.may_take(keys.EMBED_QUEUE)


# --- what the fleet has to do --------------------------------------------------------------------


def wait_in_queue(world: World, *priorities: int) -> None:
    for priority in priorities:
        world.client.lpush(lane(keys.EMBED_QUEUE, priority), "message")


def backlog(world: World) -> Backlog | None:
    found: Any = world.client.get(keys.backlog())
    return Backlog.from_json(found)


def test_a_router_tells_clients_what_waits_and_how_fast_it_is_worked_off(world: World) -> None:
    world.add("a", load=(3, 300, 300), tokens_per_s=1000.0)
    world.add("b", load=(1, 50, 50), tokens_per_s=None)
    world.add("c", load=(1, 7000, 1024), tokens_per_s=9000.0, state=DeviceState.UNHEALTHY)
    world.route(*(sized(world, 100) for _ in range(3)))
    world.now += 0.125
    world.router.may_take(keys.EMBED_QUEUE)
    wait_in_queue(world, 0, 0, 3, 6, 9)
    world.tick(0)
    # What waits is taken to be like what came before.
    assert backlog(world) == Backlog(tokens=5 * 100 + 350, tokens_per_s=1000.0)
    assert 0 < world.client.ttl(keys.backlog()) <= keys.BACKLOG_S


def test_what_waits_is_judged_by_what_came_lately(world: World) -> None:
    world.add("a", credit_tokens=10**9)
    world.route(*(sized(world, 1000) for _ in range(300)))
    world.route(*(sized(world, 100) for _ in range(1500)))
    world.now += 0.125
    world.router.may_take(keys.EMBED_QUEUE)
    wait_in_queue(world, *[0] * 10)
    world.tick()
    found = backlog(world)
    assert found is not None
    assert 1000 <= found.tokens < 1100


def test_a_router_reports_once_a_second(world: World) -> None:
    world.tick()
    wait_in_queue(world, 0)
    world.add("a", load=(1, 50, 50))
    world.router.may_take(keys.EMBED_QUEUE)
    world.tick(0.875)
    assert backlog(world) == Backlog(0, 0.0)
    world.tick(0.125)
    assert backlog(world) == Backlog(50, 1000.0)
