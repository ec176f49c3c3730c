"""What a worker counts: speeds in the router's unit, and batches against those of their size."""

import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as laws
from hypothesis import strategies as st

from sutra_tasks.batching.jobs import Batch
from sutra_tasks.health.baseline import BLOCK, FORGET_S, BaselineBatchTimes
from sutra_tasks.health.states import HealthMeasurements
from sutra_tasks.health.statistics import (
    ANSWERS_KEPT,
    LEAST_BATCHES,
    SLOT_S,
    SPEED_BATCHES,
    WINDOW_S,
    Statistics,
)

MINUTES = 60.0


class Clock:
    """A clock that moves when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Device:
    """Statistics on such a clock, and short ways to feed them."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.statistics = Statistics(self.clock)

    def batches(
        self, count: int, compute_s: float, *, tokens: int = 1000, errors: int = 0, every_s: float = 0.1
    ) -> None:
        for _ in range(count):
            self.clock.now += every_s
            self.statistics.batch(Batch(10, tokens, errors, compute_s))

    def answer(
        self, seconds: float = 0.1, *, compute_s: float = 0.02, estimated: int = 10, tokens: int = 10
    ) -> None:
        self.statistics.answer(seconds, compute_s=compute_s, estimated_tokens=estimated, tokens=tokens)

    @property
    def summary(self) -> dict[str, Any]:
        return self.statistics.summary()

    @property
    def measured(self) -> HealthMeasurements:
        return self.statistics.measurements(None)

    @property
    def ratio(self) -> float | None:
        """Times its usual batch time."""
        measured = self.measured
        if measured.recent_latency_s is None or measured.baseline_latency_s is None:
            return None
        return measured.recent_latency_s / measured.baseline_latency_s


@pytest.fixture
def device() -> Device:
    return Device()


def test_a_worker_that_did_nothing_knows_nothing(device: Device) -> None:
    assert device.summary == {
        "tasks": 0,
        "texts": 0,
        "tokens": 0,
        "batches": 0,
        "errors": 0,
        "busy_s": 0.0,
        "p50_ms": 0.0,
        "p95_ms": 0.0,
        "tokens_per_s": None,
        "latency_s": None,
        "latency_per_token_s": None,
    }
    assert device.measured == HealthMeasurements()


def test_totals_count_from_the_start(device: Device) -> None:
    device.statistics.batch(Batch(texts=3, tokens=40, errors=1, compute_s=0.5))
    device.clock.now += 60 * MINUTES
    device.statistics.batch(Batch(texts=2, tokens=2, errors=0, compute_s=0.25))
    device.answer()
    counts = {"tasks": 1, "texts": 5, "tokens": 42, "batches": 2, "errors": 1, "busy_s": 0.75}
    assert counts.items() <= device.summary.items()
    assert device.statistics.batches == 2


def test_many_threads_lose_no_count(device: Device) -> None:
    def work() -> None:
        for _ in range(1000):
            device.answer(estimated=3, tokens=2)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    device.batches(200, 0.1, tokens=2, every_s=0.0)
    for thread in threads:
        thread.join()
    assert device.summary["tasks"] == 4000
    assert device.summary["tokens_per_s"] == pytest.approx(2 / 0.1 * 3 / 2)


def test_percentiles_are_of_the_last_requests(device: Device) -> None:
    device.answer(99.0)
    for milliseconds in range(ANSWERS_KEPT):
        device.answer(milliseconds / 1000)
    assert device.summary["p50_ms"] == ANSWERS_KEPT / 2
    assert device.summary["p95_ms"] == int(ANSWERS_KEPT * 0.95)


def test_speed_is_tokens_of_compute_time(device: Device) -> None:
    device.batches(2, 0.5, tokens=100, every_s=20.0)
    device.batches(1, 1.0, tokens=1800, every_s=0.1)
    assert device.summary["tokens_per_s"] == pytest.approx(1000)


def test_speed_is_counted_as_the_router_estimates_tokens(device: Device) -> None:
    device.batches(3, 0.1, tokens=100)
    device.answer(estimated=1, tokens=2)
    device.answer(estimated=299, tokens=198)
    assert device.summary["tokens_per_s"] == pytest.approx(1000 * 1.5)
    assert device.summary["latency_per_token_s"] == pytest.approx(0.001 / 1.5)


def test_the_ratio_of_estimates_is_of_the_last_requests(device: Device) -> None:
    device.batches(1, 0.1, tokens=100)
    device.answer(estimated=10**6, tokens=1)
    for _ in range(ANSWERS_KEPT):
        device.answer(estimated=20, tokens=10)
    assert device.summary["tokens_per_s"] == pytest.approx(2000)


def test_before_any_traffic_and_after_a_rest_speed_is_that_of_the_warm_up(device: Device) -> None:
    device.statistics.warmed_up(1000, 0.1)
    assert device.summary["tokens_per_s"] == pytest.approx(10_000)
    assert device.summary["latency_per_token_s"] == pytest.approx(0.0001)
    device.batches(5, 1.0, tokens=1000)
    assert device.summary["tokens_per_s"] == pytest.approx(6000 / 5.1)
    device.clock.now += WINDOW_S + 0.01
    assert device.summary["tokens_per_s"] == pytest.approx(10_000)


def test_tiny_batches_do_not_make_a_device_slow(device: Device) -> None:
    device.statistics.warmed_up(8000, 0.08)
    device.batches(SPEED_BATCHES, 0.005, tokens=12)  # 2,400 a second
    assert device.summary["tokens_per_s"] > 20_000


def test_speed_follows_the_last_batches(device: Device) -> None:
    device.batches(200, 0.1, tokens=100, every_s=0.001)
    device.batches(SPEED_BATCHES, 0.2, tokens=100, every_s=0.001)
    assert device.summary["tokens_per_s"] == pytest.approx(500)


def test_batches_in_no_time_have_no_speed(device: Device) -> None:
    device.batches(3, 0.0)
    assert device.summary["tokens_per_s"] is None


def test_latency_is_of_computing_and_not_of_waiting(device: Device) -> None:
    for _ in range(300):
        device.answer(9.0, compute_s=0.02)
    assert device.summary["latency_s"] == pytest.approx(0.02)
    device.answer(9.0, compute_s=0.02 + 0.32)
    assert device.summary["latency_s"] == pytest.approx(0.03)
    device.answer(9.0, compute_s=0.0, estimated=1, tokens=0)  # a call without texts
    assert device.summary["latency_s"] == pytest.approx(0.03)


def test_latency_per_token_weighs_batches_by_their_tokens(device: Device) -> None:
    for _ in range(400):
        device.batches(1, 0.01, tokens=1)
        device.batches(1, 0.98, tokens=98)
    assert device.summary["latency_per_token_s"] == pytest.approx(0.99 / 99, rel=0.02)


@pytest.mark.parametrize(
    ("known", "recent", "expected"),
    [(BLOCK - 1, 0, None), (BLOCK, LEAST_BATCHES - 1, None), (BLOCK, LEAST_BATCHES, 1.0)],
)
def test_too_few_batches_are_no_latency(
    device: Device, known: int, recent: int, expected: float | None
) -> None:
    device.batches(known + recent, 0.02)
    assert device.ratio == (None if expected is None else pytest.approx(expected))


def test_a_device_that_slows_down_is_seen_within_the_window(device: Device) -> None:
    device.batches(600, 0.02)
    device.batches(600, 0.06)
    assert device.ratio == pytest.approx(3, rel=0.15)
    assert device.measured.recent_latency_s == pytest.approx(0.06, rel=0.15)


def test_the_window_ends(device: Device) -> None:
    device.batches(200, 0.02, errors=0)
    device.batches(20, 0.02, errors=2)
    assert (device.measured.recent_texts, device.measured.recent_errors) == (2200, 40)
    device.clock.now += WINDOW_S - SLOT_S
    assert device.measured.recent_errors == 40
    device.clock.now += SLOT_S + 0.1
    assert device.measured == HealthMeasurements()


@laws(max_examples=30, deadline=None)
@given(
    small=st.integers(1, 4000),
    factor=st.sampled_from([1, 2, 3, 10, 100]),
    fixed_s=st.floats(0, 1),
    per_token_s=st.floats(1e-6, 1e-3),
)
def test_a_change_in_the_size_of_batches_is_no_slowness(
    small: int, factor: int, fixed_s: float, per_token_s: float
) -> None:
    device = Device()
    for tokens in (small, small * factor):
        for _ in range(2):
            device.batches(3 * BLOCK, fixed_s + per_token_s * tokens, tokens=tokens)
            device.clock.now += 2 * WINDOW_S
            device.batches(LEAST_BATCHES, fixed_s + per_token_s * tokens, tokens=tokens)
            assert device.ratio == pytest.approx(1, rel=1e-6)


@laws(max_examples=60, deadline=None)
@given(
    octave=st.integers(0, 13),
    where=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    fixed_s=st.floats(0.001, 1),
    per_token_s=st.floats(1e-7, 1e-3),
)
def test_within_a_size_the_usual_time_is_off_by_a_root_of_two_at_most(
    octave: int, where: tuple[float, float], fixed_s: float, per_token_s: float
) -> None:
    baseline = BaselineBatchTimes()
    seen, asked = (2**octave + int(share * (2**octave - 1)) for share in where)
    for _ in range(BLOCK):
        baseline.learn(seen, fixed_s + per_token_s * seen, 0.0)
    found = baseline.seconds(asked)
    assert found is not None
    assert 1 / 1.415 < (fixed_s + per_token_s * asked) / found < 1.415


@pytest.mark.parametrize(
    ("compute_s", "hours", "least", "most"),
    [
        (0.04, 1, 1.9, 2.0),  # slower: still twice the usual after an hour,
        (0.04, 24, 1.2, 1.5),  # the new usual after days
        (0.01, 0.1, 0.8, 1.0),  # much faster: almost at once
        (0.018, 1, 0.9, 0.91),  # a little faster: by chance, for all we know
    ],
)
def test_what_is_usual_rises_in_days_and_falls_in_minutes(
    compute_s: float, hours: float, least: float, most: float
) -> None:
    baseline = BaselineBatchTimes()
    for _ in range(BLOCK):
        baseline.learn(1000, 0.02, 0.0)
    blocks = 50
    for block in range(1, blocks + 1):
        for _ in range(BLOCK):
            baseline.learn(1000, compute_s, block / blocks * hours * 60 * MINUTES)
    found = baseline.seconds(1000)
    assert found is not None
    assert least <= compute_s / found <= most


def test_a_stall_is_not_learned() -> None:
    baseline = BaselineBatchTimes()
    for block in range(100):
        for batch in range(BLOCK):
            baseline.learn(1000, 9.0 if batch % 3 == 0 else 0.02, float(block))
    assert baseline.seconds(1000) == pytest.approx(0.02)


def test_a_rest_of_days_does_not_overshoot() -> None:
    baseline = BaselineBatchTimes()
    for now, compute_s in [(0.0, 0.02), (10 * FORGET_S, 0.05)]:
        for _ in range(BLOCK):
            baseline.learn(1000, compute_s, now)
    assert baseline.seconds(1000) == pytest.approx(0.05)


def test_batches_with_errors_are_not_timed(device: Device) -> None:
    device.batches(BLOCK + LEAST_BATCHES, 0.02)
    device.batches(100, 1.0, errors=1)
    assert device.ratio == pytest.approx(1)


@pytest.mark.parametrize(("spread", "most"), [(0.1, 1.05), (0.3, 1.2), (0.5, 1.5)])
def test_noise_is_no_slowness(device: Device, spread: float, most: float) -> None:
    for compute_s in 0.02 * np.exp(np.random.default_rng(0).normal(0, spread, 12_000)):
        device.batches(1, float(compute_s))
    assert device.ratio is not None
    assert 0.9 < device.ratio < most
