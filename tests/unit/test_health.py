"""The laws of a device's states: what degrades it, what makes it leave, and how it returns."""

from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import settings as laws
from hypothesis import strategies as st

from sutra_tasks.health.states import (
    LEAST_TEXTS,
    DeviceState,
    HealthMeasurements,
    HealthStatus,
    HealthThresholds,
    assess,
    next_state,
)

THRESHOLDS = HealthThresholds(latency_multiplier=2.0, error_rate=0.1, memory_share=0.92)
GOOD = HealthMeasurements(0.018, 0.018, 1000, 0, 0.5)
SLOW = HealthMeasurements(0.041, 0.018, 1000, 0, 0.5)
FULL = HealthMeasurements(0.018, 0.018, 1000, 0, 0.95)
FAILING = HealthMeasurements(0.018, 0.018, 60, 12, 0.5)
NOTHING = HealthMeasurements()

STATES = st.sampled_from(
    [state for state in DeviceState if state not in (DeviceState.REFUSED, DeviceState.DEAD)]
)
CHECKS = st.sampled_from([True, False, None])
ANY_THRESHOLDS = st.builds(
    HealthThresholds,
    latency_multiplier=st.floats(1, 10),
    error_rate=st.floats(0, 1),
    memory_share=st.floats(0, 1),
)
TEXTS_AND_ERRORS = st.integers(0, 200).flatmap(
    lambda texts: st.tuples(st.just(texts), st.integers(0, texts))
)
MEASURED = st.builds(
    lambda recent_s, usual_s, counts, share: HealthMeasurements(
        recent_s, usual_s, counts[0], counts[1], share
    ),
    st.none() | st.floats(0.001, 10),
    st.none() | st.floats(0.001, 10),
    TEXTS_AND_ERRORS,
    st.none() | st.floats(0, 1),
)

EDGES = {
    (DeviceState.STARTING, DeviceState.HEALTHY),
    (DeviceState.STARTING, DeviceState.DEGRADED),
    (DeviceState.STARTING, DeviceState.UNHEALTHY),
    (DeviceState.HEALTHY, DeviceState.DEGRADED),
    (DeviceState.HEALTHY, DeviceState.UNHEALTHY),
    (DeviceState.DEGRADED, DeviceState.HEALTHY),
    (DeviceState.DEGRADED, DeviceState.UNHEALTHY),
    (DeviceState.UNHEALTHY, DeviceState.PROBING),
    (DeviceState.PROBING, DeviceState.HEALTHY),
    (DeviceState.PROBING, DeviceState.DEGRADED),
    (DeviceState.PROBING, DeviceState.UNHEALTHY),
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
def test_what_is_wrong_is_said(measured: HealthMeasurements, expected: HealthStatus) -> None:
    status = assess(measured, THRESHOLDS)
    assert status == expected
    assert status.is_healthy == (not expected.warnings)


def test_everything_that_is_wrong_is_said_at_once() -> None:
    status = assess(HealthMeasurements(0.9, 0.1, 100, 50, 1.0), THRESHOLDS)
    assert (status.performance_degraded, status.high_error_rate, status.memory_pressure) == (True,) * 3
    assert len(status.warnings) == 3


@pytest.mark.parametrize(
    ("at", "over"),
    [
        (HealthMeasurements(2.0, 1.0), HealthMeasurements(2.01, 1.0)),
        (
            HealthMeasurements(recent_texts=50, recent_errors=5),
            HealthMeasurements(recent_texts=50, recent_errors=6),
        ),
        (HealthMeasurements(memory_share=0.92), HealthMeasurements(memory_share=0.921)),
        # Too few texts to tell:
        (
            HealthMeasurements(recent_texts=LEAST_TEXTS - 1, recent_errors=LEAST_TEXTS - 1),
            HealthMeasurements(recent_texts=LEAST_TEXTS, recent_errors=LEAST_TEXTS - 1),
        ),
    ],
)
def test_a_threshold_counts_when_it_is_passed(at: HealthMeasurements, over: HealthMeasurements) -> None:
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
    seconds: float, thresholds: HealthThresholds, state: DeviceState, check: bool | None
) -> None:
    for measured in (HealthMeasurements(seconds, None), HealthMeasurements(None, seconds), NOTHING):
        assert assess(measured, thresholds).is_healthy
        after = next_state(state, measured, thresholds, check_passed=check)
        assert after is DeviceState.HEALTHY or state in (DeviceState.UNHEALTHY, DeviceState.PROBING)


@laws(max_examples=50, deadline=None)
@given(
    measured=MEASURED,
    thresholds=ANY_THRESHOLDS,
    state=st.sampled_from([DeviceState.STARTING, DeviceState.HEALTHY, DeviceState.DEGRADED]),
    check=st.sampled_from([True, None]),
)
def test_slowness_and_a_full_memory_alone_make_no_device_leave(
    measured: HealthMeasurements, thresholds: HealthThresholds, state: DeviceState, check: bool | None
) -> None:
    well = HealthMeasurements(
        measured.recent_latency_s,
        measured.baseline_latency_s,
        measured.recent_texts,
        0,
        measured.memory_share,
    )
    after = next_state(state, well, thresholds, check_passed=check)
    assert after in (DeviceState.HEALTHY, DeviceState.DEGRADED)


@laws(max_examples=50, deadline=None)
@given(measured=MEASURED, thresholds=ANY_THRESHOLDS, state=STATES)
def test_a_device_that_computes_wrong_vectors_leaves_whatever_else_is_so(
    measured: HealthMeasurements, thresholds: HealthThresholds, state: DeviceState
) -> None:
    assert next_state(state, measured, thresholds, check_passed=False) is DeviceState.UNHEALTHY


@laws(max_examples=50, deadline=None)
@given(measured=MEASURED, thresholds=ANY_THRESHOLDS, state=STATES, check=st.sampled_from([True, None]))
def test_a_device_that_fails_too_many_texts_leaves(
    measured: HealthMeasurements, thresholds: HealthThresholds, state: DeviceState, check: bool | None
) -> None:
    if assess(measured, thresholds).high_error_rate:
        assert next_state(state, measured, thresholds, check_passed=check) is DeviceState.UNHEALTHY


@laws(max_examples=60, deadline=None)
@given(measured=MEASURED, thresholds=ANY_THRESHOLDS, check=CHECKS)
def test_who_was_refused_or_is_dead_stays_so(
    measured: HealthMeasurements, thresholds: HealthThresholds, check: bool | None
) -> None:
    for state in (DeviceState.REFUSED, DeviceState.DEAD):
        assert next_state(state, measured, thresholds, check_passed=check) is state


def test_the_ways_that_are_drawn_are_the_ways_that_are() -> None:
    measured = [GOOD, SLOW, FULL, FAILING, NOTHING]
    found = {
        (state, next_state(state, one, THRESHOLDS, check_passed=check))
        for state, one, check in product(DeviceState, measured, [True, False, None])
    }
    assert {(one, other) for one, other in found if one is not other} == EDGES


@laws(max_examples=50, deadline=None)
@given(measured=MEASURED, thresholds=ANY_THRESHOLDS, state=STATES, check=CHECKS)
def test_while_nothing_changes_a_device_comes_to_rest(
    measured: HealthMeasurements, thresholds: HealthThresholds, state: DeviceState, check: bool | None
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
        (HealthMeasurements(1.51, 1.0), HealthMeasurements(2.01, 1.0)),
        (HealthMeasurements(memory_share=0.88), HealthMeasurements(memory_share=0.93)),
    ],
)
def test_a_device_at_the_edge_does_not_flap(under: HealthMeasurements, over: HealthMeasurements) -> None:
    state, way = DeviceState.HEALTHY, []
    for measured in (under, over, under, over, under):
        state = next_state(state, measured, THRESHOLDS, check_passed=None)
        way.append(state)
    assert way == [DeviceState.HEALTHY, *[DeviceState.DEGRADED] * 4]


@laws(max_examples=60, deadline=None)
@given(thresholds=ANY_THRESHOLDS)
def test_a_degraded_device_that_is_as_usual_recovers(thresholds: HealthThresholds) -> None:
    usual = HealthMeasurements(1.0, 1.0, 1000, 0, 0.0)
    after = next_state(DeviceState.DEGRADED, usual, thresholds, check_passed=None)
    assert after is DeviceState.HEALTHY


def test_an_unhealthy_device_returns_by_two_checks_and_a_clean_trial() -> None:
    few_errors = HealthMeasurements(recent_texts=5, recent_errors=1)
    state = DeviceState.HEALTHY
    for measured, check, expected in [
        (FAILING, None, DeviceState.UNHEALTHY),
        (NOTHING, None, DeviceState.UNHEALTHY),  # nobody looked
        (FAILING, True, DeviceState.UNHEALTHY),  # its errors are still recent
        (NOTHING, True, DeviceState.PROBING),
        (GOOD, None, DeviceState.PROBING),
        (few_errors, True, DeviceState.UNHEALTHY),  # on trial, one of five is too many
        (NOTHING, True, DeviceState.PROBING),
        (GOOD, True, DeviceState.HEALTHY),
    ]:
        state = next_state(state, measured, THRESHOLDS, check_passed=check)
        assert state is expected


def test_a_device_that_returns_slow_is_degraded() -> None:
    assert next_state(DeviceState.PROBING, SLOW, THRESHOLDS, check_passed=True) is DeviceState.DEGRADED
