"""What a device measures of a stream: percentiles to half a bucket, sums, and the last minute."""

import json
from math import sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as laws
from hypothesis import strategies as st

from sutra_tasks.streaming.metrics import (
    PERCENTILES,
    RATIO,
    WINDOW_S,
    MetricsWindow,
    StreamMetrics,
    bucket,
    histogram,
    middle_ms,
    percentiles,
)

TIMES_MS = st.floats(0.06, 1e6)
COUNTS = st.integers(0, 10**6)
HISTOGRAMS = st.dictionaries(st.integers(0, 300), st.integers(1, 1000), max_size=5)
COSINES = st.integers(-64, 64).map(lambda some: some / 64)  # their sums are exact
MEASUREMENTS = st.builds(
    StreamMetrics,
    latency=HISTOGRAMS,
    chunk=HISTOGRAMS,
    formation=HISTOGRAMS,
    chunks=COUNTS,
    errors=COUNTS,
    claimed=COUNTS,
    chars=COUNTS,
    overlap_chars=COUNTS,
    checked=COUNTS,
    consistency_sum=COSINES,
    consistency_least=COSINES,
)
HALF_A_BUCKET = sqrt(RATIO) * 1.01  # they are rounded to a microsecond as well


@laws(max_examples=50)
@given(values=st.lists(TIMES_MS, min_size=1, max_size=300))
def test_percentiles_are_those_of_the_values_to_half_a_bucket(values: list[float]) -> None:
    found = percentiles(histogram(values))
    assert tuple(found) == PERCENTILES
    for percentile, value in found.items():
        exact = float(np.percentile(values, percentile, method="inverted_cdf"))
        assert exact / HALF_A_BUCKET <= value <= exact * HALF_A_BUCKET


def test_percentiles_of_a_hundred_times() -> None:
    found = percentiles(histogram(range(1, 101)))
    assert found == {number: pytest.approx(number, rel=0.04) for number in (50, 90, 95, 99)}
    assert percentiles({}) == {}
    assert set(percentiles({7: 1}).values()) == {round(middle_ms(7), 3)}


@laws(max_examples=50)
@given(one=st.lists(TIMES_MS, max_size=50), other=st.lists(TIMES_MS, max_size=50))
def test_percentiles_of_a_fleet_are_those_of_all_its_values(
    one: list[float], other: list[float]
) -> None:
    both = StreamMetrics(latency=histogram(one)).plus(StreamMetrics(latency=histogram(other)))
    assert percentiles(both.latency) == percentiles(histogram([*one, *other]))


@given(milliseconds=TIMES_MS)
def test_a_bucket_holds_what_is_near_its_middle(milliseconds: float) -> None:
    middle = middle_ms(bucket(milliseconds))
    assert max(middle / milliseconds, milliseconds / middle) <= sqrt(RATIO) * (1 + 1e-9)


def test_times_beyond_all_buckets_are_in_the_first_and_last() -> None:
    assert bucket(-5.0) == bucket(0.0) == bucket(0.05) == 0
    assert bucket(0.0501) == 1
    assert bucket(1e12) == 300
    assert middle_ms(0) == 0.05
    assert 8 < middle_ms(300) / 3_600_000 < 9


@laws(max_examples=60)
@given(one=MEASUREMENTS, two=MEASUREMENTS, three=MEASUREMENTS)
def test_it_does_not_matter_in_which_order_devices_are_added_up(
    one: StreamMetrics, two: StreamMetrics, three: StreamMetrics
) -> None:
    assert one.plus(two) == two.plus(one)
    assert one.plus(two).plus(three) == one.plus(two.plus(three))
    assert one.plus(StreamMetrics()).chunks == one.chunks


def test_a_sum_holds_what_both_have() -> None:
    one = StreamMetrics(latency={1: 2, 5: 1}, chunks=3, errors=1, chars=50, overlap_chars=5)
    two = StreamMetrics(latency={5: 4}, formation={0: 1}, chunks=5, claimed=2, chars=30)
    assert one.plus(two) == StreamMetrics(
        latency={1: 2, 5: 5}, formation={0: 1}, chunks=8, errors=1, claimed=2, chars=80, overlap_chars=5
    )


@laws(max_examples=60)
@given(one=MEASUREMENTS)
def test_measurements_survive_json(one: StreamMetrics) -> None:
    value = json.loads(json.dumps(one.to_json()))
    assert StreamMetrics.from_json(value) == one
    assert StreamMetrics.from_json({**value, "of a newer release": {"a": [1]}}) == one


def test_what_an_older_release_did_not_measure_is_nothing() -> None:
    assert StreamMetrics.from_json({"chunks": 3}) == StreamMetrics(chunks=3)
    assert StreamMetrics.from_json({}) == StreamMetrics()


def test_rates_of_nothing_are_nothing() -> None:
    nothing = StreamMetrics()
    assert (nothing.error_rate, nothing.overlap_ratio, nothing.consistency) == (0.0, 0.0, None)
    some = StreamMetrics(chunks=3, errors=1, chars=200, overlap_chars=20)
    assert (some.error_rate, some.overlap_ratio) == (0.25, 0.1)
    assert StreamMetrics(errors=1).error_rate == 1


def checked(cosine: float) -> StreamMetrics:
    return StreamMetrics(checked=1, consistency_sum=cosine, consistency_least=cosine)


def test_consistency_is_the_mean_of_what_was_checked_and_its_least() -> None:
    total = checked(1.0).plus(checked(0.5)).plus(StreamMetrics(chunks=7))
    assert (total.checked, total.consistency, total.consistency_least) == (2, 0.75, 0.5)
    assert checked(-0.5).consistency_least == -0.5


@laws(max_examples=60)
@given(steps_s=st.lists(st.floats(0, 40), max_size=30), later_s=st.floats(0, 70))
def test_a_window_holds_the_last_minute(steps_s: list[float], later_s: float) -> None:
    window, now_s, times = MetricsWindow(), 1000.0, []
    for step_s in steps_s:
        now_s += step_s
        times.append(now_s)
        window.add(StreamMetrics(chunks=1), now_s)
    now_s += later_s
    found = window.total(now_s).chunks
    # To a second: it counts by the second.
    assert found >= sum(now_s - one <= WINDOW_S - 1 for one in times)
    assert found <= sum(now_s - one < WINDOW_S for one in times)
    assert len(window._seconds) <= WINDOW_S + 1


def test_a_window_forgets_after_a_minute_even_if_nothing_happens() -> None:
    window = MetricsWindow()
    window.add(StreamMetrics(latency={3: 1}, chunks=1), 100.0)
    window.add(StreamMetrics(latency={3: 1}, chunks=2), 100.9)
    assert window.total(159.99) == StreamMetrics(latency={3: 2}, chunks=3)
    assert window.total(160.0) == StreamMetrics()


def test_a_window_keeps_one_sum_a_second() -> None:
    window = MetricsWindow()
    for at in range(10_000):
        window.add(StreamMetrics(chunks=1), at / 50)
    assert len(window._seconds) == 60
    assert window.total(200.0).chunks == 59 * 50
