"""Pressure on a stream: the specification's table to the digit, and hysteresis downwards only."""

from itertools import pairwise
from math import inf, nextafter

import pytest
from hypothesis import given
from hypothesis import settings as laws
from hypothesis import strategies as st

from sutra_tasks.streaming.backpressure import (
    ACTIONS,
    BackpressureAction,
    Level,
    next_level,
    pause_s,
    system_load,
)

NORMAL, MODERATE, SEVERE = Level
USES = st.floats(0, 1.5) | st.sampled_from([0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
LEVELS = st.sampled_from(Level)
SHARES = st.lists(st.none() | st.floats(0, 1), max_size=5)


def above(value: float) -> float:
    return nextafter(value, inf)


def below(value: float) -> float:
    return nextafter(value, -inf)


def specified(use: float, load: float) -> Level:
    """Return the level of ``manage_backpressure``, in its own words."""
    if use > 0.9 and load > 0.8:
        return SEVERE
    if use > 0.7 or load > 0.6:
        return MODERATE
    return NORMAL


def test_the_actions_are_the_specifications() -> None:
    assert {
        NORMAL: BackpressureAction(1.0, increase_batch_size=False, shed_low_priority=False),
        MODERATE: BackpressureAction(0.8, increase_batch_size=True, shed_low_priority=False),
        SEVERE: BackpressureAction(0.5, increase_batch_size=True, shed_low_priority=True),
    } == ACTIONS


@pytest.mark.parametrize(
    ("use", "load", "expected"),
    [
        (0.0, 0.0, NORMAL),
        (0.7, 0.6, NORMAL),
        (above(0.7), 0.0, MODERATE),
        (below(0.7), 0.0, NORMAL),
        (0.0, above(0.6), MODERATE),
        (0.0, below(0.6), NORMAL),
        (0.9, 0.8, MODERATE),
        (above(0.9), 0.8, MODERATE),
        (0.9, above(0.8), MODERATE),
        (above(0.9), above(0.8), SEVERE),
        (below(0.9), above(0.8), MODERATE),
        (above(0.9), below(0.8), MODERATE),
        (1.0, 0.0, MODERATE),  # a full buffer alone, and a busy machine alone, are not severe
        (0.0, 1.0, MODERATE),
        (1.0, 1.0, SEVERE),
        (1.3, 1.0, SEVERE),  # a producer ignored the signal
    ],
)
def test_a_level_rises_exactly_where_the_specification_says(
    use: float, load: float, expected: Level
) -> None:
    assert next_level(use, load, NORMAL) is expected
    assert specified(use, load) is expected


@laws(max_examples=80)
@given(use=USES, load=USES)
def test_from_normal_the_level_is_the_specifications(use: float, load: float) -> None:
    assert next_level(use, load, NORMAL) is specified(use, load)


@laws(max_examples=80)
@given(use=USES, load=USES, before=LEVELS)
def test_hysteresis_delays_only_the_way_down(use: float, load: float, before: Level) -> None:
    found, now = next_level(use, load, before), specified(use, load)
    assert now <= found <= max(now, before)
    # It depends on nothing else: the same signal does not move it again.
    assert next_level(use, load, found) is found


@pytest.mark.parametrize(
    ("before", "use", "load", "expected"),
    [
        (MODERATE, 0.65, 0.0, MODERATE),
        (MODERATE, 0.61, 0.49, MODERATE),
        (MODERATE, 0.59, 0.51, MODERATE),
        (MODERATE, 0.59, 0.49, NORMAL),
        (MODERATE, 0.85, 0.75, MODERATE),  # what holds a level does not raise to it
        (SEVERE, 0.81, 0.71, SEVERE),
        (SEVERE, 0.79, 0.71, MODERATE),
        (SEVERE, 0.81, 0.69, MODERATE),
        (SEVERE, 0.61, 0.0, MODERATE),
        (SEVERE, 0.0, 0.51, MODERATE),
        (SEVERE, 0.59, 0.49, NORMAL),
        (NORMAL, 0.65, 0.55, NORMAL),
        (NORMAL, 0.85, 0.0, MODERATE),
        (NORMAL, 0.95, 0.95, SEVERE),
    ],
)
def test_a_level_is_left_a_tenth_below_where_it_begins(
    before: Level, use: float, load: float, expected: Level
) -> None:
    assert next_level(use, load, before) is expected


def test_a_signal_that_flaps_at_the_edge_moves_the_level_once() -> None:
    found = [NORMAL]
    for _ in range(50):
        for use in (0.69, 0.71):
            found.append(next_level(use, 0.0, found[-1]))
    assert sum(before is not after for before, after in pairwise(found)) == 1


@laws(max_examples=50)
@given(shares=SHARES)
def test_the_load_is_the_mean_by_use(shares: list[float | None]) -> None:
    present = [share for share in shares if share is not None]
    found = system_load(*shares)
    assert found == system_load(*present)  # None is left out, and is not 0
    assert 0 <= found <= 1
    if sum(present) > 0:
        assert found == pytest.approx(sum(one * one for one in present) / sum(present), abs=1e-12)
        assert found <= max(present) + 1e-12
        assert found >= sum(present) / len(present) - 1e-12  # the bottleneck weighs most
    else:
        assert found == 0


def test_loads_by_hand() -> None:
    for unused in ((), (None,), (0.0, 0.0, None)):
        assert system_load(*unused) == 0
    assert system_load(0.5, None, None) == 0.5
    assert system_load(1.0, 0.0, 0.0) == 1.0
    assert system_load(0.2, 0.4) == pytest.approx(0.2 / 0.6)
    assert system_load(0.9, 0.3, 0.3) == pytest.approx(0.99 / 1.5)


def test_a_share_beyond_the_whole_counts_as_the_whole() -> None:
    assert system_load(1.7, 0.5) == system_load(1.0, 0.5)
    assert system_load(-0.3, 0.5) == 0.5


@laws(max_examples=50)
@given(own_s=st.floats(0, 100), rate=st.floats(0.1, 1))
def test_a_producer_that_rests_offers_the_asked_share_of_its_own_rate(own_s: float, rate: float) -> None:
    assert own_s == pytest.approx(rate * (own_s + pause_s(own_s, rate)))
    assert pause_s(own_s, 1.0) == 0


def test_a_clock_that_went_back_makes_no_negative_rest() -> None:
    assert pause_s(-1.0, 0.5) == 0
