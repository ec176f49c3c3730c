"""Routing in the client: a call goes straight to a device, or the ordinary way."""

from collections import Counter
from typing import Any

import fakeredis
import pytest
import redis

from sutra_tasks import keys
from sutra_tasks.membership.fleet import FleetMember
from sutra_tasks.routing import direct, fleet_view
from sutra_tasks.routing.direct import DirectRouter, route
from sutra_tasks.routing.fleet_view import SNAPSHOT_AGE_S
from sutra_tasks.settings import Settings
from tests.records import record

HEADERS = {"sutra": {"v": 1, "texts": 0, "bytes": 400}}  # 100 tokens


class World:
    """A client process with a clock and a fleet that a test changes."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.members: list[FleetMember] = []
        self.reads = 0
        self.error: Exception | None = None
        self.router = DirectRouter(
            Settings(strategy="least_loaded"),
            fakeredis.FakeRedis(server=fakeredis.FakeServer()),
            clock=lambda: self.now,
        )

    def read(self, _: object) -> list[FleetMember]:
        self.reads += 1
        if self.error is not None:
            raise self.error
        return self.members

    def add(self, name: str, *, age_s: float = 0.0, **facts: Any) -> None:
        said = record(name, **{"tokens_per_s": 1000.0, "credit_tokens": 300, **facts})
        self.members.append(FleetMember(name, age_s, said))


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()
    monkeypatch.setattr(fleet_view, "fleet_members", world.read)
    return world


def test_calls_go_to_devices_as_long_as_these_have_credit(world: World) -> None:
    world.add("a")
    world.add("b")
    queues = [world.router.queue_for(HEADERS) for _ in range(8)]
    assert Counter(queues) == {keys.device_queue("a"): 3, keys.device_queue("b"): 3, None: 2}
    assert world.reads == 1
    world.now += 1.25 * SNAPSHOT_AGE_S  # they have finished
    assert world.router.queue_for(HEADERS) is not None
    assert world.reads == 2


def test_without_a_live_device_a_call_takes_the_ordinary_way(world: World) -> None:
    assert world.router.queue_for(HEADERS) is None
    world.now += 1.0
    world.add("dead", age_s=7.0)
    assert world.router.queue_for(HEADERS) is None


@pytest.mark.parametrize("header", [{"v": 2}, {"v": 1, "strategy": "fastest"}])
def test_a_call_that_cannot_be_routed_takes_the_ordinary_way(world: World, header: Any) -> None:
    world.add("a")
    assert world.router.queue_for({"sutra": header}) is None
    assert world.router.queue_for({}) is not None


@pytest.mark.parametrize("error", [redis.ConnectionError(), redis.TimeoutError(), OSError()])
def test_calls_do_not_wait_one_by_one_for_a_server_that_is_away(world: World, error: Exception) -> None:
    world.add("a")
    assert world.router.queue_for(HEADERS) is not None
    world.now += 1.25 * SNAPSHOT_AGE_S
    world.error = error
    assert [world.router.queue_for(HEADERS) for _ in range(5)] == [None] * 5
    assert world.reads == 2
    world.now += 1.25 * SNAPSHOT_AGE_S
    world.error = None
    assert world.router.queue_for(HEADERS) is not None


def test_only_calls_of_embed_are_routed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.add("a")
    monkeypatch.setattr(direct, "_router", lambda: world.router)
    assert route("project.mail", (), {}, {}) is None
    assert route(keys.EMBED_TASK, (), {}, {"headers": HEADERS}) == {"queue": keys.device_queue("a")}
    assert route(keys.EMBED_TASK, (), {}, {"headers": None}) == {"queue": keys.device_queue("a")}
