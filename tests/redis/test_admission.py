"""A client refuses calls by the backlog that routers published last, and by what it sent since."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from sutra_tasks import keys
from sutra_tasks.client.admission import READ_EVERY_S, Admission, Backlog
from sutra_tasks.errors import FleetSaturated
from sutra_tasks.host.embedded_server import embedded_server, free_port
from sutra_tasks.settings import Settings

Open = Callable[..., Admission]


class Time:
    """A clock that the test sets."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Time:
    return Time()


@pytest.fixture
def admit(url: str, clock: Time) -> Callable[[int], None]:
    """``admit(tokens)`` of a client that may leave 10 s of work waiting."""
    return Admission(Settings(broker_url=url, max_queue_s=10), clock=clock).admit


@pytest.fixture(autouse=True)
def _swept(_nothing_is_left_behind: None, client: redis.Redis) -> Iterator[None]:
    yield
    client.flushdb()


def say(client: redis.Redis, tokens: int, tokens_per_s: float = 100.0) -> None:
    """Publish a backlog, as a router does."""
    client.set(keys.backlog(), Backlog(tokens, tokens_per_s).to_json(), ex=keys.BACKLOG_S)


def reads(client: redis.Redis) -> int:
    """Return how often anybody read a key since the start of the test."""
    stats: Any = client.info("commandstats")
    return int(stats.get("cmdstat_get", {}).get("calls", 0))


@pytest.fixture(autouse=True)
def _counted(client: redis.Redis) -> None:
    client.config_resetstat()


def test_what_can_be_done_in_time_is_admitted(client: redis.Redis, admit: Callable[[int], None]) -> None:
    say(client, 1000)
    admit(5)


def test_what_cannot_be_done_in_time_is_refused_and_told_for_how_long(
    client: redis.Redis, admit: Callable[[int], None]
) -> None:
    say(client, 1570)
    with pytest.raises(FleetSaturated) as refused:
        admit(1)
    assert (refused.value.backlog_tokens, refused.value.retry_after_s) == (1570, 5.7)


def test_one_call_may_be_larger_than_what_may_wait(
    client: redis.Redis, admit: Callable[[int], None]
) -> None:
    # If it were refused now, it would be refused for ever.
    say(client, 0)
    admit(10**9)


def test_what_this_client_sent_since_it_looked_waits_too(
    client: redis.Redis, admit: Callable[[int], None]
) -> None:
    say(client, 900)
    for _ in range(3):
        admit(50)
    with pytest.raises(FleetSaturated) as refused:
        admit(50)
    assert (refused.value.backlog_tokens, refused.value.retry_after_s) == (1050, 0.5)


def test_what_was_refused_does_not_wait(client: redis.Redis, admit: Callable[[int], None]) -> None:
    say(client, 900)
    admit(200)
    for _ in range(5):
        with pytest.raises(FleetSaturated) as refused:
            admit(200)
        assert refused.value.backlog_tokens == 1100


def test_a_client_looks_twice_a_second_at_most(
    client: redis.Redis, admit: Callable[[int], None], clock: Time
) -> None:
    say(client, 0)
    for _ in range(100):
        admit(1)
    assert reads(client) == 1
    clock.now += READ_EVERY_S - 0.001
    admit(1)
    assert reads(client) == 1
    clock.now += 0.001
    for _ in range(100):
        admit(1)
    assert reads(client) == 2


def test_the_next_look_counts_anew(
    client: redis.Redis, admit: Callable[[int], None], clock: Time
) -> None:
    say(client, 0)
    admit(5000)
    with pytest.raises(FleetSaturated):
        admit(1)
    say(client, 400)
    clock.now += READ_EVERY_S
    admit(600)
    admit(1)
    with pytest.raises(FleetSaturated) as refused:
        admit(1)
    assert refused.value.backlog_tokens == 1001


def test_a_fleet_whose_speed_is_not_known_refuses_nothing(
    client: redis.Redis, admit: Callable[[int], None]
) -> None:
    say(client, 10**9, tokens_per_s=0.0)
    for _ in range(3):
        admit(10**9)


def test_without_a_router_that_says_anything_work_waits_for_one(
    client: redis.Redis, admit: Callable[[int], None], clock: Time
) -> None:
    for _ in range(3):
        admit(10**9)
    say(client, 10**6)
    clock.now += READ_EVERY_S
    with pytest.raises(FleetSaturated):
        admit(1)
    client.delete(keys.backlog())  # it ended, and its word with it
    clock.now += READ_EVERY_S
    admit(1)


def test_a_router_of_another_version_refuses_nothing(
    client: redis.Redis, admit: Callable[[int], None]
) -> None:
    client.set(keys.backlog(), '{"v": 2, "tokens": 1000000000}', ex=60)
    admit(1)


def test_a_limit_of_nothing_refuses_nothing_and_looks_at_nothing(
    url: str, client: redis.Redis, clock: Time
) -> None:
    say(client, 10**9)
    Admission(Settings(broker_url=url, max_queue_s=0), clock=clock).admit(10**9)
    assert reads(client) == 0


def test_a_server_that_is_away_refuses_nothing_and_is_looked_for_again(clock: Time) -> None:
    # Sending fails with its own error, after its usual retries.
    port = free_port()
    options = Settings(broker_url=f"redis://127.0.0.1:{port}/0", max_queue_s=10)
    admission = Admission(options, clock=clock)
    admission.admit(10**9)
    with embedded_server(port) as url, redis.Redis.from_url(url) as client:
        say(client, 10**6)
        admission.admit(1)  # not yet: it looked a moment ago
        clock.now += READ_EVERY_S
        with pytest.raises(FleetSaturated):
            admission.admit(1)
    clock.now += READ_EVERY_S
    admission.admit(1)


def test_a_server_that_does_not_answer_keeps_a_call_waiting_for_a_second_only(
    client: redis.Redis, admit: Callable[[int], None]
) -> None:
    say(client, 10**6)
    client.client_pause(1500, all=True)  # once: if it were asked again it would have answered
    admit(1)
