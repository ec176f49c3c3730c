"""Which device gets a message: who may get one, whom each strategy prefers, and refusals with facts."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import median

import pytest
from hypothesis import given
from hypothesis import settings as laws
from hypothesis import strategies as st

from sutra_tasks.broker.load import MOST_CREDIT
from sutra_tasks.client import call as calls
from sutra_tasks.client.call import Demand, check_strategy
from sutra_tasks.errors import InvalidOptionError, NoHealthyWorkersError
from sutra_tasks.health.states import DeviceState
from sutra_tasks.membership.fleet import FleetMember
from sutra_tasks.routing import balancing
from sutra_tasks.routing.balancing import TIE, TRIAL, choose
from sutra_tasks.routing.snapshot import UNLIMITED, Device, Fleet, fleet_of
from sutra_tasks.settings import STRATEGIES

PENALTY_S = 0.01
PLAIN = Demand(texts=1, bytes=400, sent_at=None, strategy=None)
MEASURING = {
    "shortest_finish": {"tokens_per_s": 1e4},
    "performance_based": {"latency_s": 0.1, "latency_per_token_s": 1e-4},
}
BY_COST = ("least_loaded", "performance_based", "shortest_finish")
AGES = st.dictionaries(st.text("abc0-", min_size=1, max_size=4), st.floats(0, 100), max_size=8)
ANY_NUMBER = st.none() | st.floats() | st.just(0.0)
POSITIVE = st.floats(1e-3, 1e6)
TICKETS = st.integers(0, 10**12)
SHARES = 6000


def fleets(**facts: st.SearchStrategy[object]) -> st.SearchStrategy[Fleet]:
    device = st.builds(
        Device,
        id=st.just(""),
        queue=st.just(""),
        state=facts.pop("state", st.just(DeviceState.HEALTHY)),
        backlog_tokens=st.integers(0, 10**6),
        backlog_messages=st.integers(0, 50),
        **facts,
    )
    devices = st.lists(device, min_size=1, max_size=8)
    return devices.map(
        lambda found: Fleet(tuple(replace(one, id=f"gpu{n}") for n, one in enumerate(found)))
    )


def fleet(size: int, **facts: object) -> Fleet:
    return Fleet(tuple(replace(Device(f"gpu{n:02}", ""), **facts) for n in range(size)))  # type: ignore[arg-type]


def with_first(found: Fleet, **facts: object) -> Fleet:
    first, *others = found.devices
    return replace(found, devices=(replace(first, **facts), *others))  # type: ignore[arg-type]


def chosen(found: Fleet, strategy: str, ticket: int, demand: Demand = PLAIN) -> Device:
    return choose(found, demand, ticket, default=strategy, queue_penalty_s=PENALTY_S)


def strategy(name: str) -> Callable[[Sequence[Device], int], Device]:
    """Return a strategy alone, without the question who may be a candidate."""
    return lambda devices, ticket: balancing.STRATEGIES[name](devices, PLAIN, ticket, PENALTY_S)


def shares(found: Fleet, name: str, *, tickets: int = SHARES) -> Counter[str]:
    """Return how many messages each device gets while the snapshot stands still."""
    return Counter(chosen(found, name, ticket).id for ticket in range(tickets))


every_strategy = pytest.mark.parametrize("name", STRATEGIES)

FUZZED = fleets(
    state=st.sampled_from(DeviceState),
    credit_used=st.integers(0, 10**5),
    credit_tokens=st.sampled_from([0, 10**4, UNLIMITED]),
    tokens_per_s=ANY_NUMBER,
    latency_s=ANY_NUMBER,
    latency_per_token_s=ANY_NUMBER,
)
RANKS = {
    DeviceState.HEALTHY: 0,
    DeviceState.DEGRADED: 0,
    DeviceState.PROBING: 1,
    DeviceState.UNHEALTHY: 2,
}


# Who may get a message.


@laws(max_examples=40, deadline=None)
@given(found=FUZZED, ticket=TICKETS, name=st.sampled_from(STRATEGIES))
def test_work_goes_to_the_healthiest_that_stand_and_to_idle_ones_on_probation(
    found: Fleet, ticket: int, name: str
) -> None:
    ranks = [RANKS[one.state] for one in found.devices if one.state in RANKS]
    if not ranks:
        with pytest.raises(NoHealthyWorkersError):
            chosen(found, name, ticket)
        return
    device = chosen(found, name, ticket)
    assert device in found.devices
    on_probation = device.state is DeviceState.PROBING and device.backlog_messages == 0
    assert RANKS[device.state] == min(ranks) or on_probation


@laws(max_examples=40, deadline=None)
@given(found=FUZZED, ticket=TICKETS, name=st.sampled_from(STRATEGIES))
def test_credit_is_kept_where_there_is_any(found: Fleet, ticket: int, name: str) -> None:
    standing = [one for one in found.devices if one in found.eligible]
    credit = [one.credit_used < one.credit_tokens for one in standing]
    assert found.has_credit == any(credit)
    if found.has_credit:
        assert chosen(found, name, ticket).has_credit


@every_strategy
def test_without_credit_anywhere_all_are_candidates_again(name: str) -> None:
    full = fleet(3, credit_used=10, credit_tokens=10)
    assert not full.has_credit
    assert len(shares(full, name)) == 3


@pytest.mark.parametrize(
    ("states", "standing"),
    [
        ("healthy degraded probing unhealthy dead", "healthy degraded"),
        ("degraded probing", "degraded"),
        ("probing unhealthy starting", "probing"),
        ("unhealthy refused", "unhealthy"),
        ("starting refused dead", ""),
    ],
)
def test_the_last_ones_standing_are_kept(states: str, standing: str) -> None:
    found = Fleet(tuple(Device(name, "", DeviceState(name)) for name in states.split()))
    assert [device.id for device in found.eligible] == standing.split()


@every_strategy
@pytest.mark.parametrize("size", [2, 16])
def test_an_idle_device_on_probation_gets_a_small_share_of_a_fair_one(name: str, size: int) -> None:
    found = with_first(fleet(size, **MEASURING.get(name, {})), state=DeviceState.PROBING)
    share = shares(found, name)["gpu00"] / SHARES
    assert share * size == pytest.approx(1 / TRIAL, rel=0.2)
    for busy in ({"backlog_messages": 1}, {"credit_tokens": 0}):
        assert shares(with_first(found, **busy), name)["gpu00"] == 0


@every_strategy
def test_trials_are_at_nobodys_expense_in_particular(name: str) -> None:
    found = with_first(fleet(6, **MEASURING.get(name, {})), state=DeviceState.PROBING)
    sent = shares(found, name)
    others = [sent[one.id] for one in found.devices[1:]]
    assert min(others) > 0.9 * max(others)


@every_strategy
@pytest.mark.parametrize("state", ["unhealthy", "starting", "refused", "dead"])
def test_no_other_state_is_tried(name: str, state: str) -> None:
    assert shares(with_first(fleet(3), state=DeviceState(state)), name)["gpu00"] == 0


@every_strategy
def test_a_degraded_device_gets_less_than_a_healthy_one_and_more_than_none(name: str) -> None:
    idle = with_first(fleet(4, **MEASURING.get(name, {})), state=DeviceState.DEGRADED)
    filled, under_load = idle, Counter[str]()
    for ticket in range(400):
        device = chosen(filled, name, ticket)
        filled = filled.after_sending(device, PLAIN.tokens)
        under_load[device.id] += 1
    for sent in (shares(idle, name), under_load):
        assert 0 < sent["gpu00"] < 0.75 * min(sent[one.id] for one in idle.devices[1:])


@pytest.mark.parametrize(
    ("name", "usual", "far_better"),
    [
        ("shortest_finish", {"tokens_per_s": 1e3}, {"tokens_per_s": 1e6}),
        ("performance_based", {"latency_s": 0.1}, {"latency_s": 0.001}),
        ("performance_based", {"latency_per_token_s": 1e-3}, {"latency_per_token_s": 1e-6}),
    ],
)
@pytest.mark.parametrize("nothing", [None, 0.0, float("nan")])
def test_an_idle_device_without_a_measurement_gets_work_to_be_measured(
    name: str, usual: dict[str, float], far_better: dict[str, float], nothing: float | None
) -> None:
    best, unknown, *known = fleet(4, **dict.fromkeys(usual, nothing)).devices
    best, *known = replace(best, **far_better), *(replace(one, **usual) for one in known)  # type: ignore[arg-type]
    sent = shares(Fleet((best, unknown, *known)), name)
    assert sent[unknown.id] / SHARES == pytest.approx(1 / (4 * TRIAL), rel=0.2)
    assert sent[best.id] == SHARES - sent[unknown.id]
    busy = replace(unknown, backlog_messages=1, backlog_tokens=10)
    assert shares(Fleet((best, busy, *known)), name)[busy.id] == 0


@laws(max_examples=25, deadline=None)
@given(found=FUZZED.filter(lambda found: found.eligible), ticket=TICKETS)
def test_the_same_snapshot_and_ticket_give_the_same_device(found: Fleet, ticket: int) -> None:
    for name in STRATEGIES:
        assert chosen(found, name, ticket) is chosen(found, name, ticket)


# What each strategy prefers.


@laws(max_examples=25, deadline=None)
@given(healthy=st.integers(1, 12), degraded=st.integers(0, 6), start=TICKETS, rounds=st.integers(1, 3))
def test_round_robin_gives_each_the_same_share_and_a_degraded_one_half(
    healthy: int, degraded: int, start: int, rounds: int
) -> None:
    devices = fleet(healthy).devices + fleet(degraded, state=DeviceState.DEGRADED).devices
    tickets = range(start, start + rounds * (2 * healthy + degraded))
    sent = Counter(strategy("round_robin")(devices, ticket) for ticket in tickets)
    assert sent == {one: rounds * (2 if one.state is DeviceState.HEALTHY else 1) for one in devices}


def test_round_robin_needs_no_measurements_and_tries_none() -> None:
    assert shares(fleet(5), "round_robin", tickets=500) == dict.fromkeys(shares(fleet(5), "random"), 100)


def test_random_draws_evenly_and_a_degraded_device_half_as_often() -> None:
    devices = with_first(fleet(4), state=DeviceState.DEGRADED).devices
    sent = Counter(strategy("random")(devices, ticket).id for ticket in range(SHARES))
    full = SHARES / 3.5
    assert sent["gpu00"] == pytest.approx(full / 2, rel=0.1)
    assert [sent[one.id] for one in devices[1:]] == pytest.approx([full] * 3, rel=0.1)


def test_random_keeps_no_order() -> None:
    devices = fleet(4).devices
    draws = [strategy("random")(devices, ticket).id for ticket in range(SHARES)]
    pairs = Counter(pairwise(draws))
    assert len(pairs) == 16
    assert max(pairs.values()) < 1.3 * min(pairs.values())


def test_draws_are_those_of_splitmix64() -> None:
    # The generator's published first outputs for the seed 0.
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [balancing._draw(ticket) for ticket in range(3)] == expected


@laws(max_examples=40, deadline=None)
@given(found=fleets(), ticket=TICKETS)
def test_least_loaded_chooses_among_the_shortest_queues(found: Fleet, ticket: int) -> None:
    shortest = min(one.backlog_messages for one in found.devices)
    assert strategy("least_loaded")(found.devices, ticket).backlog_messages == shortest


@laws(max_examples=40, deadline=None)
@given(found=fleets(latency_s=POSITIVE, latency_per_token_s=st.none() | POSITIVE), ticket=TICKETS)
def test_performance_based_chooses_the_specifications_highest_score(found: Fleet, ticket: int) -> None:
    def score(device: Device) -> float:
        latency_s = device.latency_s
        if device.latency_per_token_s is not None:
            latency_s = device.latency_per_token_s * PLAIN.tokens
        assert latency_s is not None
        return 1 / (latency_s + device.backlog_messages * PENALTY_S)

    best = max(map(score, found.devices))
    device = strategy("performance_based")(found.devices, ticket)
    assert score(device) * (1 + TIE) >= best * (1 - 1e-9)


def finish_s(device: Device) -> float:
    assert device.tokens_per_s is not None
    return (device.backlog_tokens + PLAIN.tokens) / device.tokens_per_s


@laws(max_examples=40, deadline=None)
@given(found=fleets(tokens_per_s=POSITIVE), ticket=TICKETS)
def test_shortest_finish_chooses_where_this_message_is_done_first(found: Fleet, ticket: int) -> None:
    first = min(map(finish_s, found.devices))
    device = strategy("shortest_finish")(found.devices, ticket)
    assert finish_s(device) <= first * (1 + TIE) * (1 + 1e-9)


def test_shortest_finish_counts_the_message_itself() -> None:
    slow_and_idle = Device("slow", "", tokens_per_s=1000.0)
    fast_and_busy = Device("fast", "", tokens_per_s=4000.0, backlog_tokens=600, backlog_messages=1)
    found = Fleet((fast_and_busy, slow_and_idle))
    small, large = (Demand(0, 4 * tokens, None, None) for tokens in (100, 1000))
    assert chosen(found, "shortest_finish", 0, small).id == "slow"  # 100/1000 < 700/4000
    assert chosen(found, "shortest_finish", 0, large).id == "fast"  # 1000/1000 > 1600/4000


@laws(max_examples=40, deadline=None)
@given(speeds=st.lists(st.floats(1e3, 1e5), min_size=2, max_size=6))
def test_shortest_finish_fills_each_device_by_its_speed(speeds: list[float]) -> None:
    found = Fleet(tuple(Device(f"gpu{n}", "", tokens_per_s=v) for n, v in enumerate(speeds)))
    for ticket in range(300):
        found = found.after_sending(chosen(found, "shortest_finish", ticket), PLAIN.tokens)
    ahead_s = [finish_s(device) for device in found.devices]
    one_message_s = PLAIN.tokens / min(speeds)
    assert max(ahead_s) <= (min(ahead_s) + one_message_s) * (1 + TIE)


@pytest.mark.parametrize("name", BY_COST)
@laws(max_examples=30, deadline=None)
@given(alike=st.integers(1, 6), start=TICKETS)
def test_devices_that_tie_take_turns(name: str, alike: int, start: int) -> None:
    facts = {"tokens_per_s": 1e4, "latency_s": 0.1}
    equal = fleet(alike, **facts).devices
    worse = replace(equal[0], backlog_messages=100, backlog_tokens=10**5)
    tickets = range(start, start + 2 * alike)
    sent = Counter(strategy(name)([worse, *equal], ticket) for ticket in tickets)
    assert sent == dict.fromkeys(equal, 2)


@pytest.mark.parametrize(
    ("name", "fact"),
    [
        ("shortest_finish", "tokens_per_s"),
        ("performance_based", "latency_s"),
        ("performance_based", "latency_per_token_s"),
    ],
)
@laws(max_examples=25, deadline=None)
@given(found=fleets(), data=st.data(), ticket=TICKETS)
def test_an_unmeasured_device_counts_as_the_median(
    name: str, fact: str, found: Fleet, data: st.DataObject, ticket: int
) -> None:
    values = data.draw(
        st.lists(
            st.sampled_from([None, 0.0, -1.0, float("nan")]) | POSITIVE,
            min_size=len(found.devices),
            max_size=len(found.devices),
        )
    )
    known = [value for value in values if value is not None and value > 0]
    # With nothing known, backlogs alone decide: at any speed, and at no latency beside the queue's.
    middle = median(known) if known else 1.0 if fact == "tokens_per_s" else 1e-12
    filled = [value if value is not None and value > 0 else middle for value in values]

    def of(measured: Sequence[float | None]) -> list[Device]:
        pairs = zip(found.devices, measured, strict=True)
        return [replace(device, **{fact: value}) for device, value in pairs]  # type: ignore[arg-type]

    assert strategy(name)(of(values), ticket).id == strategy(name)(of(filled), ticket).id


@pytest.mark.parametrize("name", BY_COST)
def test_a_degraded_device_costs_double(name: str) -> None:
    facts = {"tokens_per_s": 1e4, "latency_s": 0.1, "backlog_messages": 1, "backlog_tokens": 102}
    devices = with_first(fleet(2, **facts), state=DeviceState.DEGRADED).devices
    twice = replace(
        devices[1], backlog_messages=3, backlog_tokens=306, latency_s=0.2 - 0.01, tokens_per_s=1e4
    )
    more = replace(devices[1], backlog_messages=4, backlog_tokens=409, latency_s=0.25, tokens_per_s=1e4)
    assert {strategy(name)([devices[0], twice], ticket).id for ticket in range(2)} == {"gpu00", "gpu01"}
    assert {strategy(name)([devices[0], more], ticket).id for ticket in range(2)} == {"gpu00"}


# The snapshot between two looks.


@laws(max_examples=25, deadline=None)
@given(found=FUZZED, data=st.data(), tokens=st.integers(1, 10**6))
def test_a_dispatch_is_seen_on_its_device_alone(found: Fleet, data: st.DataObject, tokens: int) -> None:
    device = data.draw(st.sampled_from(found.devices))
    after = found.after_sending(device, tokens)
    for one, before in zip(after.devices, found.devices, strict=True):
        if before is device:
            more = replace(
                before,
                backlog_tokens=before.backlog_tokens + tokens,
                backlog_messages=before.backlog_messages + 1,
                credit_used=before.credit_used + min(tokens, MOST_CREDIT),
            )
            assert repr(one) == repr(more)  # NaN is no equal of itself
        else:
            assert one is before
    assert (after.known, after.oldest_heartbeat_s) == (found.known, found.oldest_heartbeat_s)


def test_a_dispatch_from_an_older_snapshot_counts_on_the_device_of_that_name() -> None:
    before, now = fleet(3), fleet(2, backlog_tokens=7)
    assert now.after_sending(before.devices[1], 5).devices[1].backlog_tokens == 12
    assert now.after_sending(before.devices[2], 5) == now  # gone meanwhile


# Refusals, and the router's way in.


@pytest.mark.parametrize(("known", "oldest_s"), [(0, None), (4, 31.0)])
def test_an_empty_fleet_is_told_with_what_is_known_of_it(known: int, oldest_s: float | None) -> None:
    with pytest.raises(NoHealthyWorkersError) as refused:
        chosen(Fleet((), known, oldest_s), "round_robin", 0)
    assert (refused.value.known, refused.value.oldest_heartbeat_s) == (known, oldest_s)


@pytest.mark.parametrize("devices", [0, 2])
def test_an_unknown_strategy_is_refused_by_name(devices: int) -> None:
    demand = replace(PLAIN, strategy="fastest")
    for choice in (
        lambda: check_strategy("fastest"),
        lambda: chosen(fleet(devices), "round_robin", 0, demand),
        lambda: chosen(fleet(devices), "fastest", 0),
    ):
        with pytest.raises(InvalidOptionError, match=r"'fastest'.*round_robin") as refused:
            choice()
        assert refused.value.option == "strategy"


@pytest.mark.parametrize(
    ("asked", "default", "expected"),
    [("last", "round_robin", "gpu02"), (None, "last", "gpu02"), ("round_robin", "last", "gpu00")],
)
def test_a_messages_own_strategy_wins(
    monkeypatch: pytest.MonkeyPatch, asked: str | None, default: str, expected: str
) -> None:
    monkeypatch.setattr(calls, "STRATEGIES", ("round_robin", "last"))
    strategies = {**balancing.STRATEGIES, "last": lambda devices, *_: devices[-1]}
    monkeypatch.setattr(balancing, "STRATEGIES", strategies)
    assert chosen(fleet(3), default, 0, replace(PLAIN, strategy=asked)).id == expected


def test_every_strategy_that_may_be_asked_for_is_there() -> None:
    assert tuple(balancing.STRATEGIES) == STRATEGIES


# Where devices come from.


@laws(max_examples=25, deadline=None)
@given(ages=AGES, ttl_s=st.floats(0, 100))
def test_a_device_lives_while_its_heartbeat_is_young(ages: dict[str, float], ttl_s: float) -> None:
    found = fleet_of([FleetMember(name, age, None) for name, age in sorted(ages.items())], ttl_s)
    ids = [device.id for device in found.devices]
    assert ids == sorted(name for name, age in ages.items() if age <= ttl_s)
    assert [device.queue for device in found.devices] == [f"sutra.device.{name}" for name in ids]
    assert found.known == len(ages)
    assert found.oldest_heartbeat_s == (max(ages.values()) if ages else None)


@pytest.mark.parametrize("name", STRATEGIES)
@given(ticket=st.integers(0, 2**32))
def test_a_model_goes_to_devices_that_have_it_while_they_have_credit(name: str, ticket: int) -> None:
    one = fleet(4)
    having = tuple(replace(d, models=("m",)) if d.id in ("gpu01", "gpu02") else d for d in one.devices)
    asked = replace(PLAIN, model="m")
    assert chosen(replace(one, devices=having), name, ticket, asked).id in ("gpu01", "gpu02")
    busy = tuple(replace(d, credit_used=d.credit_tokens) if d.models else d for d in having)
    assert chosen(replace(one, devices=busy), name, ticket, asked).id in ("gpu00", "gpu03")
    assert chosen(one, name, ticket, asked).id in {device.id for device in one.devices}
