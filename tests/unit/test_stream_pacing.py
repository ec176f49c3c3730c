"""How much a device takes from its streams, and how long it waits."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sutra_tasks.streaming.consumer import pacing
from sutra_tasks.streaming.consumer.pacing import (
    Wait,
    delivery,
    entries_of_stream,
    entries_to_take,
    growing_pause_s,
    next_wait,
    until_full_s,
)

sizes = st.integers(1, 64)
counts = st.integers(0, 1000)
IDLE: dict[str, Any] = {
    "free": 8,
    "in_flight": 0,
    "has_texts": False,
    "forming": 0,
    "streams": 2,
    "empty_streams": 2,
}


@given(sizes, counts, counts, counts)
def test_a_device_never_has_more_than_a_few_batches(
    size: int, waiting: int, in_flight: int, forming: int
) -> None:
    free = entries_to_take(size, waiting=waiting, in_flight=in_flight, forming=forming)
    assert max(0, free) + in_flight + forming <= max(in_flight + forming, pacing.MOST_BATCHES * size)


@given(sizes, counts)
def test_tasks_never_keep_a_stream_from_its_one_batch(size: int, waiting: int) -> None:
    assert entries_to_take(size, waiting=waiting, in_flight=0, forming=0) >= size
    assert entries_to_take(size, waiting=10_000, in_flight=0, forming=size) == 0


def test_so_much_is_taken_ahead_that_the_engine_never_waits() -> None:
    ahead = pacing.AHEAD_BATCHES * 8
    assert entries_to_take(8, waiting=0, in_flight=0, forming=0) == ahead
    assert entries_to_take(8, waiting=5, in_flight=16, forming=2) == ahead - 5 - 2


@given(st.integers(-10, 1000), sizes, st.integers(1, 50))
def test_a_stream_gives_its_share_or_a_full_batch(free: int, size: int, streams: int) -> None:
    most = entries_of_stream(free, size, streams)
    assert most <= free
    assert most >= min(free, size)
    assert most <= max(size, free // streams)


@pytest.mark.parametrize(
    ("deliveries", "expected"),
    [(0, "batch"), (1, "alone"), (2, "alone"), (3, "dead letter"), (4, "dead letter")],
)
def test_a_delivery_without_an_answer_makes_a_suspect_and_too_many_a_dead_letter(
    deliveries: int, expected: str
) -> None:
    assert delivery(deliveries, 3) == expected


@pytest.mark.parametrize(
    ("oldest_age_s", "expected"), [(None, 0.2), (0.0, 0.05), (0.04, 0.01), (0.05, 0.001), (9, 0.001)]
)
def test_a_wait_ends_when_the_forming_batch_must_go(oldest_age_s: float | None, expected: float) -> None:
    assert until_full_s(oldest_age_s, 0.05, 0.2) == pytest.approx(expected)
    assert until_full_s(oldest_age_s, 60.0, 0.2) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, Wait("entry", pacing.IDLE_S)),
        ({"free": 0, "has_texts": True}, Wait("progress", pacing.POLL_S)),
        ({"in_flight": 1, "has_texts": True}, Wait("progress", pacing.POLL_S)),
        ({"has_texts": True, "forming": 1}, Wait("stop", pacing.OPEN_TEXT_S)),
        ({"forming": 1}, Wait("stop", pacing.POLL_S)),
        ({"empty_streams": 1}, Wait("stop", pacing.POLL_S)),
    ],
)
def test_a_device_waits_for_what_can_happen_next(change: dict[str, Any], expected: Wait) -> None:
    assert next_wait(**IDLE | change) == expected


def test_a_device_without_a_sound_stream_waits_for_no_entry() -> None:
    assert next_wait(**IDLE | {"streams": 0, "empty_streams": 0}) == Wait("stop", pacing.IDLE_S)


def test_a_pause_doubles_with_each_failure_up_to_its_most() -> None:
    assert [growing_pause_s(failures, 0.5, 4.0) for failures in range(1, 6)] == [0.5, 1, 2, 4, 4]
    assert growing_pause_s(10**6, 0.5, 4.0) == 4
