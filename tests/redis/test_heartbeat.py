"""A device says that it lives from its start to its end, and hears that others took its work."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from sutra_tasks import keys
from sutra_tasks.host.embedded_server import embedded_server, free_port
from sutra_tasks.membership.fleet import beat, fleet_members
from sutra_tasks.membership.heartbeat import Heartbeat
from tests.conftest import wait_until
from tests.records import RECORD, record
from tests.redis.peers import full_memory

if TYPE_CHECKING:
    from sutra_tasks.membership.device_record import DeviceRecord

Start = Callable[..., Heartbeat]

NEVER_S = 3600.0
OFTEN_S = 0.01


class Mortal(Heartbeat):
    """A heartbeat that can end before its process does."""

    ended = False

    def _run(self) -> None:
        with suppress(SystemExit):
            super()._run()

    def _step(self) -> None:
        if self.ended:
            raise SystemExit
        super()._step()


@pytest.fixture(autouse=True)
def _swept(_nothing_is_left_behind: None, client: redis.Redis) -> Iterator[None]:
    """What heartbeats leave behind is a law of the registry's."""
    yield
    client.flushdb()


@pytest.fixture
def start(_swept: None, client: redis.Redis) -> Iterator[Start]:
    """Start a heartbeat of ``RECORD``, or of another one."""
    started: list[Mortal] = []

    def start_one(
        describe: Callable[[], DeviceRecord] = lambda: RECORD,
        *,
        interval_s: float = NEVER_S,
        client: redis.Redis = client,
        **options: Any,
    ) -> Heartbeat:
        started.append(Mortal(client, describe, interval_s, **options))
        started[-1].start()
        return started[-1]

    yield start_one
    for heartbeat in started:
        heartbeat.ended = True
        heartbeat.hasten()
        heartbeat._thread.join(10)
        assert not heartbeat._thread.is_alive()


def beats(client: redis.Redis, incarnation: str = RECORD.incarnation) -> int:
    counted: Any = client.hget(keys.leases(), incarnation)
    return int(counted or 0)


def beaten(client: redis.Redis, times: int) -> bool:
    return beats(client) == times


def records(client: redis.Redis) -> list[DeviceRecord | None]:
    return [seen.record for seen in fleet_members(client)]


def test_a_heartbeat_registers_at_once(client: redis.Redis, start: Start) -> None:
    start()
    wait_until(lambda: records(client) == [RECORD])
    assert beats(client) == 1


def test_a_heartbeat_goes_on_and_tells_what_is_new(client: redis.Redis, start: Start) -> None:
    number = count()
    start(lambda: replace(RECORD, tasks=next(number)), interval_s=OFTEN_S)
    wait_until(lambda: any(one.tasks >= 5 for one in records(client) if one))
    wait_until(lambda: beats(client) >= 6)


def test_a_hastened_heartbeat_comes_now(client: redis.Redis, start: Start) -> None:
    heartbeat = start()
    for expected in (1, 2, 3):
        wait_until(partial(beaten, client, expected))
        heartbeat.hasten()
    wait_until(lambda: beats(client) == 4)


def test_who_leaves_is_gone_at_once_and_keeps_its_lease(client: redis.Redis, start: Start) -> None:
    other = record("gpu1")
    beat(client, other)
    heartbeat = start(interval_s=OFTEN_S)
    wait_until(lambda: beats(client))
    heartbeat.leave()
    assert records(client) == [other]
    before = beats(client)
    wait_until(lambda: beats(client) > before + 2)
    assert records(client) == [other]
    heartbeat.leave()


def test_a_full_server_still_keeps_the_lease_of_who_leaves(client: redis.Redis, start: Start) -> None:
    with full_memory(client):
        heartbeat = start(interval_s=OFTEN_S)
        wait_until(lambda: beats(client))
        heartbeat.leave()
        before = beats(client)
        wait_until(lambda: beats(client) > before + 2)


def test_who_leaves_does_not_take_its_successor_along(client: redis.Redis, start: Start) -> None:
    heartbeat = start()
    wait_until(lambda: beats(client))
    successor = record("gpu0", "2")
    beat(client, successor)
    heartbeat.leave()
    assert records(client) == [successor]


def test_a_device_that_cannot_describe_itself_any_more_can_leave(
    client: redis.Redis, start: Start
) -> None:
    said = iter([RECORD])
    heartbeat = start(lambda: next(said))
    wait_until(lambda: beats(client))
    heartbeat.leave()
    assert records(client) == []
    wait_until(lambda: beats(client) == 2)


def test_a_device_that_never_described_itself_can_leave(client: redis.Redis, start: Start) -> None:
    described = threading.Event()

    def describe() -> DeviceRecord:
        described.set()
        raise RuntimeError

    heartbeat = start(describe)
    assert described.wait(10)
    heartbeat.leave()
    assert client.keys() == []


def test_a_heartbeat_that_never_began_can_leave(client: redis.Redis) -> None:
    # A device worker may be stopped before it has reached its broker.
    Heartbeat(client, lambda: RECORD, NEVER_S).leave()


def test_a_description_that_fails_once_ends_no_heartbeat(client: redis.Redis, start: Start) -> None:
    number = count()

    def describe() -> DeviceRecord:
        if next(number) == 1:
            raise RuntimeError
        return RECORD

    start(describe, interval_s=OFTEN_S)
    wait_until(lambda: beats(client) >= 3)


def test_a_heartbeat_outlives_an_absent_server(start: Start) -> None:
    port = free_port()
    described = count()

    def describe() -> DeviceRecord:
        next(described)
        return RECORD

    patient: Any = {"socket_timeout": 5.0, "retry": Retry(NoBackoff(), 0)}
    with redis.Redis(port=port, **patient) as own, redis.Redis(port=port, **patient) as client:
        heartbeat = start(describe, client=own, interval_s=0.02)
        wait_until(lambda: next(described) >= 3)
        with embedded_server(port):
            wait_until(lambda: records(client) == [RECORD])
        heartbeat.leave()  # with no server to tell


# --- a lease that was lost -----------------------------------------------------------------------


def test_a_first_beat_is_no_lost_lease(client: redis.Redis, start: Start) -> None:
    client.hset(keys.leases(), RECORD.incarnation, 0)  # as a worker does before it loads its model
    lost: list[int] = []
    start(interval_s=OFTEN_S, on_lost=lambda: lost.append(1))
    wait_until(lambda: beats(client) >= 3)
    assert not lost


def test_a_lease_that_was_taken_is_noticed_once(client: redis.Redis, start: Start) -> None:
    lost: list[int] = []
    start(interval_s=OFTEN_S, on_lost=lambda: lost.append(1))
    wait_until(lambda: beats(client) >= 3)
    client.hdel(keys.leases(), RECORD.incarnation)
    wait_until(lambda: lost)
    wait_until(lambda: beats(client) >= 3)
    assert lost == [1]


def test_a_lease_that_was_taken_from_one_who_leaves_is_noticed(
    client: redis.Redis, start: Start
) -> None:
    lost: list[int] = []
    heartbeat = start(interval_s=OFTEN_S, on_lost=lambda: lost.append(1))
    wait_until(lambda: beats(client) >= 3)
    heartbeat.leave()
    client.hdel(keys.leases(), RECORD.incarnation)
    wait_until(lambda: lost == [1])


def test_a_lost_lease_is_told_until_somebody_could_hear_it(client: redis.Redis, start: Start) -> None:
    # Whether others took it is asked of the server with the results, which may be away.
    told: list[int] = []

    def on_lost() -> None:
        told.append(1)
        if len(told) < 3:
            raise redis.ConnectionError

    start(interval_s=OFTEN_S, on_lost=on_lost)
    wait_until(lambda: beats(client) >= 3)
    client.hdel(keys.leases(), RECORD.incarnation)
    wait_until(lambda: len(told) == 3)
    now = beats(client)
    wait_until(lambda: beats(client) > now + 2)
    assert len(told) == 3


class LosesAnswers(redis.Redis):
    """A client that reaches the server; ``unheard`` of its answers do not come back."""

    unheard = heard = 0

    def execute_command(self, *args: Any, **options: Any) -> Any:
        answer = super().execute_command(*args, **options)  # type: ignore[no-untyped-call]
        if self.unheard:
            self.unheard -= 1
            raise redis.ConnectionError("lost")
        self.heard += 1
        return answer


def test_a_lost_lease_is_noticed_if_the_answer_that_told_it_was_lost(
    url: str, client: redis.Redis, start: Start
) -> None:
    lost: list[int] = []
    with LosesAnswers.from_url(url, socket_timeout=10.0) as own:
        heartbeat = start(client=own, on_lost=lambda: lost.append(1))
        for expected in (1, 2, 3):
            wait_until(partial(beaten, client, expected))
            heartbeat.hasten()
        wait_until(lambda: own.heard == 4)
        own.unheard = 1
        client.hdel(keys.leases(), RECORD.incarnation)
        heartbeat.hasten()
        wait_until(lambda: not own.unheard)
        heartbeat.hasten()
        wait_until(lambda: lost)
        assert beats(client) == 2
