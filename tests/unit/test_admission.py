"""Which backlog is over the limit, without a server."""

import json

import pytest
from hypothesis import given
from hypothesis import settings as laws
from hypothesis import strategies as st

from sutra_tasks.client.admission import Admission, Backlog, excess_s
from sutra_tasks.settings import Settings

TOKENS = st.integers(0, 10**12)
SPEEDS = st.floats(1e-3, 1e9)
SECONDS = st.floats(1e-3, 1e6)


@pytest.mark.parametrize(
    ("tokens", "tokens_per_s", "max_queue_s", "expected"),
    [
        (0, 100.0, 10.0, -10.0),
        (500, 100.0, 10.0, -5.0),
        (1000, 100.0, 10.0, 0.0),
        (1500, 100.0, 10.0, 5.0),
        (10**9, 0.0, 10.0, 0.0),  # a fleet whose speed is not known refuses nothing
        (10**9, 100.0, 0.0, 0.0),  # nor does one that is told not to
    ],
)
def test_an_excess_is_the_time_beyond_what_may_wait(
    tokens: int, tokens_per_s: float, max_queue_s: float, expected: float
) -> None:
    assert excess_s(tokens, tokens_per_s, max_queue_s) == pytest.approx(expected)


@laws(max_examples=50, deadline=None)
@given(tokens=TOKENS, speed=SPEEDS, limit_s=SECONDS)
def test_after_the_excess_was_worked_off_as_much_waits_as_may(
    tokens: int, speed: float, limit_s: float
) -> None:
    excess = excess_s(tokens, speed, limit_s)
    left = tokens - excess * speed
    assert left == pytest.approx(limit_s * speed, rel=1e-6, abs=1e-6 * tokens)


@laws(max_examples=50, deadline=None)
@given(tokens=TOKENS, more=st.integers(1, 10**6), speed=SPEEDS, limit_s=SECONDS)
def test_more_work_and_a_slower_fleet_are_never_less_of_an_excess(
    tokens: int, more: int, speed: float, limit_s: float
) -> None:
    excess = excess_s(tokens, speed, limit_s)
    assert excess_s(tokens + more, speed, limit_s) >= excess
    assert excess_s(tokens, speed / 2, limit_s) >= excess


def test_a_backlog_reads_back_as_it_was_written() -> None:
    backlog = Backlog(12_345, 678.5)
    assert Backlog.from_json(backlog.to_json()) == backlog
    assert Backlog.from_json(backlog.to_json().encode()) == backlog


@pytest.mark.parametrize("text", [None, "null", json.dumps({"v": 2, "tokens": 1}), "{}"])
def test_a_backlog_of_another_version_is_none(text: str | None) -> None:
    assert Backlog.from_json(text) is None


def test_what_is_never_refused_needs_no_server() -> None:
    def clock() -> float:
        raise AssertionError

    Admission(Settings(broker_url="redis://absent:1", max_queue_s=0), clock=clock).admit(10**12)
