"""The laws of a device's states: what degrades it, what makes it leave, and how it returns."""

from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import settings as laws
from hypothesis import strategies as st

from sutra_tasks.health.states import (
    LEAST_TEXTS,
    HealthStatus,
    Measurements,
    State,
    Thresholds,
    assess,
    next_state,
)

THRESHOLDS = Thresholds(latency_multiplier=2.0, error_rate=0.1, memory_share=0.92)
GOOD = Measurements(0.018, 0.018, 1000, 0, 0.5)
SLOW = Measurements(0.041, 0.018, 1000, 0, 0.5)
FULL = Measurements(0.018, 0.018, 1000, 0, 0.95)
FAILING = Measurements(0.018, 0.018, 60, 12, 0.5)
NOTHING = Measurements()

STATES = st.sampled_from([state for state in State if state not in (State.REFUSED, State.DEAD)])
CHECKS = st.sampled_from([True, False, None])
ANY_THRESHOLDS = st.builds(
    Thresholds,
    latency_multiplier=st.floats(1, 10),
    error_rate=st.floats(0, 1),
    memory_share=st.floats(0, 1),
)
TEXTS_AND_ERRORS = st.integers(0, 200).flatmap(
    lambda texts: st.tuples(st.just(texts), st.integers(0, texts))
)
MEASURED = st.builds(
    lambda recent_s, usual_s, counts, share: Measurements(
        recent_s, usual_s, counts[0], counts[1], share
    ),
    st.none() | st.floats(0.001, 10),
    st.none() | st.floats(0.001, 10),
    TEXTS_AND_ERRORS,
    st.none() | st.floats(0, 1),
)

EDGES = {
    (State.STARTING, State.HEALTHY),
    (State.STARTING, State.DEGRADED),
    (State.STARTING, State.UNHEALTHY),
    (State.HEALTHY, State.DEGRADED),
    (State.HEALTHY, State.UNHEALTHY),
    (State.DEGRADED, State.HEALTHY),
    (State.DEGRADED, State.UNHEALTHY),
    (State.UNHEALTHY, State.PROBING),
    (State.PROBING, State.HEALTHY),
    (State.PROBING, State.DEGRADED),
    (State.PROBING, State.UNHEALTHY),
}
"""The ways that docs/fleet.md draws; a starting device is judged like a healthy one."""


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (GOOD, HealthStatus()),
        (NOTHING, HealthStatus()),
        (
            SLOW,
            HealthStatus(
                performance_degraded=True,
                warnings=("Latency degradation detected: 41 ms a batch, usually 18 ms",),
            ),
        ),
        (
            FAILING,
            HealthStatus(
                high_error_rate=True,
                warnings=("High error rate detected: 12 of 60 recent texts failed",),
            ),
        ),
        (
            FULL,
            HealthStatus(memory_pressure=True, warnings=("GPU memory pressure: 95% in use",)),
        ),
    ],
)
def test_what_is_wrong_is_said(measured: Measurements, expected: HealthStatus) -> None:
    status = assess(measured, THRESHOLDS)
    assert status == expected
    assert status.is_healthy == (not expected.warnings)


def test_everything_that_is_wrong_is_said_at_once() -> None:
    status = assess(Measurements(0.9, 0.1, 100, 50, 1.0), THRESHOLDS)
    assert (status.performance_degraded, status.high_error_rate, status.memory_pressure) == (True,) * 3
    assert len(status.warnings) == 3


@pytest.mark.parametrize(
    ("at", "over"),
    [
        (Measurements(2.0, 1.0), Measurements(2.01, 1.0)),
        (Measurements(recent_texts=50, recent_errors=5), Measurements(recent_texts=50, recent_errors=6)),
        (Measurements(memory_share=0.92), Measurements(memory_share=0.921)),
        # Too few texts to tell:
        (
            Measurements(recent_texts=LEAST_TEXTS - 1, recent_errors=LEAST_TEXTS - 1),
            Measurements(recent_texts=LEAST_TEXTS, recent_errors=LEAST_TEXTS - 1),
        ),
    ],
)
def test_a_threshold_counts_when_it_is_passed(at: Measurements, over: Measurements) -> None:
    assert assess(at, THRESHOLDS).is_healthy
    assert not assess(over, THRESHOLDS).is_healthy


@laws(max_examples=60, deadline=None)
@given(
    seconds=st.floats(0, 100),
    thresholds=ANY_THRESHOLDS,
    state=STATES,
    check=st.sampled_from([True, None]),
)
def test_what_is_not_known_degrades_nobody(
    seconds: float, thresholds: Thresholds, state: State, check: bool | None
) -> None:
    for measured in (Measurements(seconds, None), Measurements(None, seconds), NOTHING):
        assert assess(measured, thresholds).is_healthy
        after = next_state(state, measured, thresholds, check_passed=check)
        assert after is State.HEALTHY or state in (State.UNHEALTHY, State.PROBING)


@laws(max_examples=100, deadline=None)
@given(
    measured=MEASURED,
    thresholds=ANY_THRESHOLDS,
    state=st.sampled_from([State.STARTING, State.HEALTHY, State.DEGRADED]),
    check=st.sampled_from([True, None]),
)
def test_slowness_and_a_full_memory_alone_make_no_device_leave(
    measured: Measurements, thresholds: Thresholds, state: State, check: bool | None
) -> None:
    well = Measurements(
        measured.recent_latency_s,
        measured.baseline_latency_s,
        measured.recent_texts,
        0,
        measured.memory_share,
    )
    after = next_state(state, well, thresholds, check_passed=check)
    assert after in (State.HEALTHY, State.DEGRADED)


@laws(max_examples=100, deadline=None)
@given(measured=MEASURED, thresholds=ANY_THRESHOLDS, state=STATES)
def test_a_device_that_computes_wrong_vectors_leaves_whatever_else_is_so(
    measured: Measurements, thresholds: Thresholds, state: State
) -> None:
    assert next_state(state, measured, thresholds, check_passed=False) is State.UNHEALTHY


@laws(max_examples=100, deadline=None)
@given(measured=MEASURED, thresholds=ANY_THRESHOLDS, state=STATES, check=st.sampled_from([True, None]))
def test_a_device_that_fails_too_many_texts_leaves(
    measured: Measurements, thresholds: Thresholds, state: State, check: bool | None
) -> None:
    if assess(measured, thresholds).high_error_rate:
        assert next_state(state, measured, thresholds, check_passed=check) is State.UNHEALTHY


@laws(max_examples=60, deadline=None)
@given(measured=MEASURED, thresholds=ANY_THRESHOLDS, check=CHECKS)
def test_who_was_refused_or_is_dead_stays_so(
    measured: Measurements, thresholds: Thresholds, check: bool | None
) -> None:
    for state in (State.REFUSED, State.DEAD):
        assert next_state(state, measured, thresholds, check_passed=check) is state


def test_the_ways_that_are_drawn_are_the_ways_that_are() -> None:
    measured = [GOOD, SLOW, FULL, FAILING, NOTHING]
    found = {
        (state, next_state(state, one, THRESHOLDS, check_passed=check))
        for state, one, check in product(State, measured, [True, False, None])
    }
    assert {(one, other) for one, other in found if one is not other} == EDGES


@laws(max_examples=100, deadline=None)
@given(measured=MEASURED, thresholds=ANY_THRESHOLDS, state=STATES, check=CHECKS)
def test_while_nothing_changes_a_device_comes_to_rest(
    measured: Measurements, thresholds: Thresholds, state: State, check: bool | None
) -> None:
    way = [state]
    for _ in range(4):
        way.append(next_state(way[-1], measured, thresholds, check_passed=check))
    assert way[-2] is way[-1]
    left = [one for one, other in pairwise(way) if one is not other]
    assert len(left) == len(set(left))


@pytest.mark.parametrize(
    ("under", "over"),
    [
        (Measurements(1.51, 1.0), Measurements(2.01, 1.0)),
        (Measurements(memory_share=0.88), Measurements(memory_share=0.93)),
    ],
)
def test_a_device_at_the_edge_does_not_flap(under: Measurements, over: Measurements) -> None:
    state, way = State.HEALTHY, []
    for measured in (under, over, under, over, under):
        state = next_state(state, measured, THRESHOLDS, check_passed=None)
        way.append(state)
    assert way == [State.HEALTHY, *[State.DEGRADED] * 4]


@laws(max_examples=60, deadline=None)
@given(thresholds=ANY_THRESHOLDS)
def test_a_degraded_device_that_is_as_usual_recovers(thresholds: Thresholds) -> None:
    usual = Measurements(1.0, 1.0, 1000, 0, 0.0)
    after = next_state(State.DEGRADED, usual, thresholds, check_passed=None)
    assert after is State.HEALTHY


def test_an_unhealthy_device_returns_by_two_checks_and_a_clean_trial() -> None:
    few_errors = Measurements(recent_texts=5, recent_errors=1)
    state = State.HEALTHY
    for measured, check, expected in [
        (FAILING, None, State.UNHEALTHY),
        (NOTHING, None, State.UNHEALTHY),  # nobody looked
        (FAILING, True, State.UNHEALTHY),  # its errors are still recent
        (NOTHING, True, State.PROBING),
        (GOOD, None, State.PROBING),
        (few_errors, True, State.UNHEALTHY),  # on trial, one of five is too many
        (NOTHING, True, State.PROBING),
        (GOOD, True, State.HEALTHY),
    ]:
        state = next_state(state, measured, THRESHOLDS, check_passed=check)
        assert state is expected


def test_a_device_that_returns_slow_is_degraded() -> None:
    assert next_state(State.PROBING, SLOW, THRESHOLDS, check_passed=True) is State.DEGRADED
