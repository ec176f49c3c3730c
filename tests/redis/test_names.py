"""The name of a device belongs to one live worker, and liveness decides, not who came last."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from sutra_tasks import keys
from sutra_tasks.broker.queues import lane, new_incarnation
from sutra_tasks.errors import DeviceNameTakenError
from sutra_tasks.membership.fleet import keep_lease
from sutra_tasks.membership.names import Patience, claim, holders, living, release
from tests.redis.flow import message

if TYPE_CHECKING:
    from collections.abc import Iterator

    import redis

PATIENCE = Patience(silent_s=6.0, unborn_s=12.0)


@pytest.fixture(autouse=True)
def _swept(_nothing_is_left_behind: None, client: redis.Redis) -> Iterator[None]:
    yield
    client.flushdb()


class Clock:
    """Time that passes only while somebody sleeps, and what beats meanwhile."""

    def __init__(self, client: redis.Redis, *beating: str) -> None:
        self.now = 0.0
        self._client, self._beating = client, beating

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        before, self.now = int(self.now), self.now + seconds
        if int(self.now) > before:
            for incarnation in self._beating:
                keep_lease(self._client, incarnation)


def take(client: redis.Redis, clock: Clock, name: str = "gpu0") -> str:
    incarnation = new_incarnation(name)
    claim(client, client, name, incarnation, patience=PATIENCE, clock=clock, sleep=clock.sleep)
    return incarnation


def test_a_name_that_nobody_has_is_given_at_once(client: redis.Redis) -> None:
    clock = Clock(client)
    mine = take(client, clock)
    assert clock.now == 0.0
    assert client.get(keys.worker("gpu0")) == mine.encode()
    assert client.hget(keys.leases(), mine) == b"0"
    assert 0 < client.ttl(keys.worker("gpu0")) <= keys.REMEMBER_S


def test_a_worker_that_beats_keeps_its_name(client: redis.Redis) -> None:
    first = take(client, Clock(client))
    clock = Clock(client, first)
    with pytest.raises(DeviceNameTakenError, match="gpu0"):
        take(client, clock)
    assert clock.now < 2.0  # told soon
    assert client.get(keys.worker("gpu0")) == first.encode()
    assert list(holders(client, ["gpu0"])) == [first]


def test_a_worker_that_was_killed_loses_its_name_and_its_messages_go_back(client: redis.Redis) -> None:
    first = take(client, Clock(client))
    keep_lease(client, first)
    client.lpush(keys.in_flight(first), message(1))
    clock = Clock(client)
    second = take(client, clock)
    assert PATIENCE.silent_s <= clock.now < PATIENCE.silent_s + 1
    assert list(holders(client, ["gpu0"])) == [second]
    assert client.llen(lane(keys.EMBED_QUEUE, 0)) == 1
    assert not client.exists(keys.in_flight(first))


def test_a_worker_that_has_not_beaten_yet_may_still_load_its_libraries(client: redis.Redis) -> None:
    take(client, Clock(client))
    clock = Clock(client)
    take(client, clock)
    assert PATIENCE.unborn_s <= clock.now


def test_a_worker_that_beats_late_keeps_its_name(client: redis.Redis) -> None:
    first = take(client, Clock(client))

    class Late(Clock):
        def sleep(self, seconds: float) -> None:
            self.now += seconds
            if self.now >= PATIENCE.unborn_s - 1:
                keep_lease(client, first)

    with pytest.raises(DeviceNameTakenError):
        take(client, Late(client))


def test_a_name_that_was_given_back_is_free_while_its_worker_still_ends(client: redis.Redis) -> None:
    first = take(client, Clock(client))
    release(client, "gpu0", first)
    clock = Clock(client, first)
    second = take(client, clock)
    assert clock.now == 0.0
    release(client, "gpu0", first)  # somebody else's by now
    assert list(holders(client, ["gpu0"])) == [second]


def test_a_worker_may_claim_its_own_name_again(client: redis.Redis) -> None:
    mine = take(client, Clock(client))
    clock = Clock(client)
    claim(client, client, "gpu0", mine, patience=PATIENCE, clock=clock, sleep=clock.sleep)
    assert clock.now == 0.0


def test_nobody_is_watched_where_nobody_has_the_names(client: redis.Redis) -> None:
    clock = Clock(client)
    assert not living(client, {}, patience=PATIENCE, clock=clock, sleep=clock.sleep)
    assert clock.now == 0.0
