"""Which device gets a message: equal shares, and refusals with facts."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import settings as laws
from hypothesis import strategies as st

from sutra_tasks import calls
from sutra_tasks.calls import Demand, check_strategy
from sutra_tasks.errors import InvalidOptionError, NoHealthyWorkersError
from sutra_tasks.fleet import balancing
from sutra_tasks.fleet.balancing import Device, Fleet, choose, round_robin
from sutra_tasks.fleet.registry import fleet_of
from sutra_tasks.settings import STRATEGIES

PLAIN = Demand(texts=1, bytes=10, sent_at=None, strategy=None)
AGES = st.dictionaries(st.text("abc0-", min_size=1, max_size=4), st.floats(0, 100), max_size=8)


def fleet(size: int) -> Fleet:
    return Fleet(devices=tuple(Device(f"gpu{n}", f"sutra.device.gpu{n}") for n in range(size)))


@laws(max_examples=60, deadline=None)
@given(size=st.integers(1, 20), start=st.integers(0, 10**9), rounds=st.integers(1, 3))
def test_round_robin_gives_every_device_the_same_share(size: int, start: int, rounds: int) -> None:
    devices = fleet(size)
    tickets = range(start, start + size * rounds)
    shares = Counter(round_robin(devices, PLAIN, ticket) for ticket in tickets)
    assert shares == dict.fromkeys(devices.devices, rounds)


@pytest.mark.parametrize(("known", "oldest_s"), [(0, None), (4, 31.0)])
def test_an_empty_fleet_is_told_with_what_is_known_of_it(known: int, oldest_s: float | None) -> None:
    with pytest.raises(NoHealthyWorkersError) as refused:
        choose(Fleet((), known, oldest_s), PLAIN, 0, default="round_robin")
    assert (refused.value.known, refused.value.oldest_heartbeat_s) == (known, oldest_s)


@pytest.mark.parametrize("devices", [0, 2])
def test_an_unknown_strategy_is_refused_by_name(devices: int) -> None:
    demand = Demand(texts=1, bytes=10, sent_at=None, strategy="fastest")
    for choice in (
        lambda: check_strategy("fastest"),
        lambda: choose(fleet(devices), demand, 0, default="round_robin"),
        lambda: choose(fleet(devices), PLAIN, 0, default="fastest"),
    ):
        with pytest.raises(InvalidOptionError, match=r"'fastest'.*round_robin") as refused:
            choice()
        assert refused.value.option == "strategy"


@pytest.mark.parametrize(
    ("asked", "default", "expected"),
    [("last", "round_robin", "gpu2"), (None, "last", "gpu2"), ("round_robin", "last", "gpu0")],
)
def test_a_messages_own_strategy_wins(
    monkeypatch: pytest.MonkeyPatch, asked: str | None, default: str, expected: str
) -> None:
    monkeypatch.setattr(calls, "STRATEGIES", ("round_robin", "last"))
    strategies = {**balancing.STRATEGIES, "last": lambda fleet, *_: fleet.devices[-1]}
    monkeypatch.setattr(balancing, "STRATEGIES", strategies)
    demand = Demand(texts=1, bytes=10, sent_at=None, strategy=asked)
    assert choose(fleet(3), demand, 0, default=default).id == expected


@laws(max_examples=60, deadline=None)
@given(ages=AGES, ttl_s=st.floats(0, 100))
def test_a_device_lives_while_its_heartbeat_is_young(ages: dict[str, float], ttl_s: float) -> None:
    found = fleet_of(ages, ttl_s)
    ids = [device.id for device in found.devices]
    assert ids == sorted(name for name, age in ages.items() if age <= ttl_s)
    assert [device.queue for device in found.devices] == [f"sutra.device.{name}" for name in ids]
    assert found.known == len(ages)
    assert found.oldest_heartbeat_s == (max(ages.values()) if ages else None)


def test_a_heartbeat_as_old_as_the_limit_still_counts() -> None:
    assert fleet_of({"gpu0": 6.0}, 6.0).devices
    assert not fleet_of({"gpu0": 6.001}, 6.0).devices


def test_every_strategy_that_may_be_asked_for_is_there() -> None:
    assert tuple(balancing.STRATEGIES) == STRATEGIES
