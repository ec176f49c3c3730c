"""When a batch of a stream is complete, and how its size climbs by what batches took."""

from dataclasses import astuple

import pytest
from hypothesis import given
from hypothesis import settings as laws
from hypothesis import strategies as st

from sutra_tasks.streaming.consumer.batch_size import (
    FORGET_S,
    MOST_BATCH_S,
    SizeMeasurement,
    SizeOptimizer,
    should_trigger,
)


@pytest.mark.parametrize(
    ("size", "oldest_age_ms", "expected"),
    [
        (0, 0.0, False),
        (0, 99.0, False),  # an empty batch never
        (1, 0.0, False),
        (1, 20.0, False),
        (1, 20.1, True),
        (7, 20.0, False),
        (8, 0.0, True),
        (9, 0.0, True),
    ],
)
def test_a_batch_is_complete_when_full_or_old(size: int, oldest_age_ms: float, expected: bool) -> None:
    assert should_trigger(size, oldest_age_ms, batch_size=8, max_latency_ms=20) is expected


def near(found: SizeMeasurement, expected: SizeMeasurement) -> bool:
    return astuple(found) == pytest.approx(astuple(expected))


def climbed(
    fixed_s: float, text_s: float, *, least: int = 8, most: int = 128, batches: int = 60
) -> tuple[SizeOptimizer, list[int]]:
    """Run a device with a backlog, 10 ms between batches; return the sizes it had."""
    optimizer, sizes = SizeOptimizer(least, most), []
    for at in range(batches):
        size = optimizer.size(at / 100, backlog=True)
        sizes.append(size)
        optimizer = optimizer.measured(size, fixed_s + text_s * size, at / 100)
    return optimizer, sizes


@pytest.mark.parametrize(
    ("least", "most", "expected"),
    [(8, 64, [8, 16, 32, 64]), (8, 63, [8, 16, 32]), (8, 8, [8]), (16, 8, [8]), (1, 3, [1, 2])],
)
def test_sizes_double_up_to_the_most(least: int, most: int, expected: list[int]) -> None:
    assert SizeOptimizer(least, most).sizes() == expected


def test_without_a_backlog_batches_are_small() -> None:
    optimizer, _ = climbed(0.001, 0.00005)
    assert optimizer.size(0.6, backlog=False) == 8
    assert SizeOptimizer(16, 8).size(0.0, backlog=False) == 8


def test_the_first_batch_has_the_least_size() -> None:
    assert SizeOptimizer(8, 128).size(0.0, backlog=True) == 8


def test_a_backlog_climbs_as_long_as_larger_is_faster() -> None:
    _, sizes = climbed(0.001, 0.00005)
    assert sizes[:5] == [8, 16, 32, 64, 128]
    assert set(sizes[5:]) == {128}


def test_a_size_that_is_hardly_faster_is_not_worth_its_latency() -> None:
    for gain, expected in ((1.04, 8), (1.06, 16)):
        seen = {8: SizeMeasurement(0.001 * gain, 0.008, 0.0), 16: SizeMeasurement(0.001, 0.016, 0.0)}
        assert SizeOptimizer(8, 16, seen).size(1.0, backlog=True) == expected


def test_a_device_without_fixed_costs_stays_small() -> None:
    _, sizes = climbed(0.0, 0.001)
    assert set(sizes) == {8, 16}  # 16 was tried
    assert sizes.count(16) == 1


def test_a_size_that_would_take_too_long_is_not_tried() -> None:
    for batch_s, expected in ((MOST_BATCH_S / 2, 16), (MOST_BATCH_S / 2 + 1e-6, 8)):
        seen = {8: SizeMeasurement(batch_s / 8, batch_s, 0.0)}
        assert SizeOptimizer(8, 64, seen).size(1.0, backlog=True) == expected


def test_a_size_that_took_too_long_is_not_used() -> None:
    for batch_s, expected in ((MOST_BATCH_S, 16), (MOST_BATCH_S + 1e-6, 8)):
        seen = {8: SizeMeasurement(0.01, 0.02, 0.0), 16: SizeMeasurement(0.001, batch_s, 0.0)}
        assert SizeOptimizer(8, 16, seen).size(1.0, backlog=True) == expected


@laws(max_examples=60)
@given(fixed_s=st.floats(0, 0.03), text_s=st.floats(1e-6, 0.01), least=st.integers(1, 16))
def test_no_size_is_used_that_takes_longer_than_a_batch_may(
    fixed_s: float, text_s: float, least: int
) -> None:
    optimizer, sizes = climbed(fixed_s, text_s, least=least, batches=40)
    assert set(sizes) <= set(optimizer.sizes())
    for size in set(sizes) - {least}:
        assert fixed_s + text_s * size <= MOST_BATCH_S + 1e-9
    assert len(set(sizes[10:])) == 1


def test_what_was_slow_is_tried_again_in_time() -> None:
    seen = {8: SizeMeasurement(0.001, 0.008, 0.0), 16: SizeMeasurement(0.002, 0.032, 0.0)}
    optimizer = SizeOptimizer(8, 16, seen).measured(8, 0.008, FORGET_S - 1)
    assert optimizer.size(FORGET_S - 0.01, backlog=True) == 8
    assert optimizer.size(FORGET_S, backlog=True) == 16


def test_where_the_least_size_is_forgotten_it_comes_first() -> None:
    seen = {8: SizeMeasurement(0.002, 0.016, 0.0), 16: SizeMeasurement(0.001, 0.016, FORGET_S)}
    assert SizeOptimizer(8, 16, seen).size(FORGET_S, backlog=True) == 8


def test_a_batch_counts_for_the_largest_size_it_fills() -> None:
    optimizer = SizeOptimizer(8, 32)
    assert optimizer.measured(7, 0.1, 0.0).seen == {}
    assert near(optimizer.measured(15, 0.15, 0.0).seen[8], SizeMeasurement(0.01, 0.08, 0.0))
    assert [*optimizer.measured(16, 0.1, 0.0).seen] == [16]
    assert [*optimizer.measured(99, 0.1, 0.0).seen] == [32]


def test_a_batch_that_took_no_time_says_nothing() -> None:
    optimizer = SizeOptimizer(8, 32)
    assert optimizer.measured(8, 0.0, 0.0) is optimizer
    assert optimizer.measured(8, -1.0, 0.0) is optimizer


def test_what_a_size_takes_is_smoothed_until_it_is_forgotten() -> None:
    once = SizeOptimizer(8, 8).measured(8, 0.08, 0.0)
    for now_s, text_s in ((1.0, 0.012), (FORGET_S, 0.02)):
        again = once.measured(8, 0.16, now_s)
        assert near(again.seen[8], SizeMeasurement(text_s, 8 * text_s, now_s))
    assert once.seen[8].at_s == 0.0  # values do not change
