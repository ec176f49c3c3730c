"""A device joins a fleet that computes the same, and shows from time to time that it still does."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from sutra_tasks import keys
from sutra_tasks.engines.golden import GoldenVectors
from sutra_tasks.engines.simulated_engine import SimulatedEncoder
from sutra_tasks.health.memory import UNKNOWN, Memory
from sutra_tasks.health.monitor import (
    CHECK_EVERY_S,
    MEMORY_EVERY_S,
    PROBE_EVERY_S,
    UNASKED,
    Monitor,
)
from sutra_tasks.health.states import DeviceState, HealthMeasurements
from sutra_tasks.settings import Settings
from tests.conftest import wait_until
from tests.redis.peers import full_memory

if TYPE_CHECKING:
    from collections.abc import Callable

    import redis

GOLDEN = GoldenVectors.of(SimulatedEncoder(width=8))
OTHER = GoldenVectors.of(SimulatedEncoder(width=4))
WRONG = GoldenVectors(GOLDEN.space, np.roll(GOLDEN.vectors, 1, axis=0))
LEASE_S = 12
IDLE_S = 30.0

WELL = HealthMeasurements(0.01, 0.01, 1000, 0, None)
SLOW = HealthMeasurements(0.05, 0.01, 1000, 0, None)
FAILING = HealthMeasurements(0.01, 0.01, 1000, 500, None)


class Device:
    """A monitor whose clock, counters and model a test holds in its hand."""

    def __init__(self, client: redis.Redis, golden: GoldenVectors = GOLDEN) -> None:
        self.now = 1000.0
        self.batches = 0
        self.measured = WELL
        self.evaluated: list[float | None] = []
        self.memory = Memory(50, 100, "a test")
        self.looked_at_memory = 0
        self.exercised: list[Future[GoldenVectors]] = []
        statistics: Any = self
        self.monitor = Monitor(
            Settings(lease_s=LEASE_S, worker_timeout_s=IDLE_S),
            client,
            statistics,
            memory=self.read_memory,
            clock=lambda: self.now,
        )
        self.golden = golden

    def measurements(self, memory_share: float | None) -> HealthMeasurements:
        self.evaluated.append(memory_share)
        return self.measured

    def read_memory(self) -> Memory:
        self.looked_at_memory += 1
        return self.memory

    def exercise(self) -> Future[GoldenVectors]:
        self.exercised.append(Future())
        return self.exercised[-1]

    def load(self) -> Device:
        self.monitor.loaded(self.golden, self.exercise)
        return self

    def step(self, after_s: float = 0.0) -> DeviceState:
        self.now += after_s
        return self.monitor.step().state

    def steps(self, for_s: float, *, busy: bool = False) -> DeviceState:
        """Take a step each second for so long."""
        until = self.now + for_s
        while self.now < until:
            self.batches += busy
            state = self.step(1.0)
        return state

    def answer(self, golden: GoldenVectors = GOLDEN) -> DeviceState:
        """Have the model end its exercise, and let that be heard."""
        self.exercised[-1].set_result(golden)
        return self.step()

    @property
    def reason(self) -> str:
        return self.monitor.verdict.reason


@pytest.fixture
def start(client: redis.Redis) -> Callable[..., Device]:
    """Start a device with these golden vectors, up to its first look."""

    def start_one(golden: GoldenVectors = GOLDEN) -> Device:
        device = Device(client, golden).load()
        device.step()
        return device

    return start_one


@pytest.fixture
def device(start: Callable[..., Device]) -> Device:
    """A device that has joined, and that has no look or check due."""
    one = start()
    one.step()
    one.looked_at_memory = 0
    return one


# --- the parity gate -----------------------------------------------------------------------------


def test_a_device_takes_no_work_before_its_model_is_loaded(client: redis.Redis) -> None:
    device = Device(client)
    assert device.steps(100) is DeviceState.STARTING
    assert not device.monitor.takes_work
    assert not device.monitor.agrees(GOLDEN)
    assert device.monitor.exercise() is None
    assert client.keys() == []


def test_the_first_device_says_what_its_fleet_computes(
    client: redis.Redis, start: Callable[..., Device]
) -> None:
    device = start()
    assert device.monitor.takes_work
    assert device.monitor.verdict.state is DeviceState.HEALTHY
    stored: Any = client.get(keys.golden())
    assert GoldenVectors.from_json(stored).disagreement(GOLDEN) is None
    assert LEASE_S - 5 < client.ttl(keys.golden()) <= LEASE_S


def test_who_computes_the_same_joins(start: Callable[..., Device]) -> None:
    start()
    assert start().monitor.verdict.state is DeviceState.HEALTHY


@pytest.mark.parametrize(
    ("golden", "expected"),
    [
        (OTHER, "another embedding space: simulated-1:4, the fleet serves simulated-1:8"),
        (WRONG, "its vectors differ from the fleet's: cosine"),
    ],
)
def test_who_computes_something_else_is_refused_and_says_why(
    client: redis.Redis, start: Callable[..., Device], golden: GoldenVectors, expected: str
) -> None:
    start()
    before = client.get(keys.golden())
    refused = start(golden)
    assert refused.steps(100) is DeviceState.REFUSED
    assert not refused.monitor.takes_work
    assert refused.reason.startswith(expected)
    assert client.get(keys.golden()) == before
    assert not refused.evaluated
    assert not refused.exercised


@pytest.mark.parametrize(("row", "value"), [(2, np.nan), (2, np.inf), (slice(None), 0.0)])
def test_who_computes_no_directions_is_refused_even_alone(
    client: redis.Redis, start: Callable[..., Device], row: int | slice, value: float
) -> None:
    vectors = GOLDEN.vectors.copy()
    vectors[row] = value
    refused = start(GoldenVectors(GOLDEN.space, vectors))
    assert refused.monitor.verdict.state is DeviceState.REFUSED
    assert refused.reason == "its vectors are no directions: not a number, infinite or zero"
    assert not client.exists(keys.golden())


@pytest.mark.parametrize("stored", ['{"v": 2}', "not json"])
def test_who_cannot_read_what_its_fleet_computes_is_refused(
    client: redis.Redis, start: Callable[..., Device], stored: str
) -> None:
    client.set(keys.golden(), stored, ex=60)
    refused = start()
    assert refused.monitor.verdict.state is DeviceState.REFUSED
    assert "golden vectors" in refused.reason


def test_who_was_refused_joins_once_nobody_serves_the_other_vectors(
    client: redis.Redis, start: Callable[..., Device]
) -> None:
    start()
    refused = start(OTHER)
    client.pexpire(keys.golden(), 1)  # the time of those that agreed ran out
    wait_until(lambda: not client.exists(keys.golden()))
    assert refused.step() is DeviceState.HEALTHY
    assert refused.reason == ""
    stored: Any = client.get(keys.golden())
    assert GoldenVectors.from_json(stored).space == OTHER.space


def test_who_was_refused_joins_once_its_fleet_computes_the_same_again(
    client: redis.Redis, start: Callable[..., Device]
) -> None:
    client.set(keys.golden(), OTHER.to_json(), ex=60)
    refused = start()
    assert refused.step() is DeviceState.REFUSED
    client.set(keys.golden(), GOLDEN.to_json(), ex=60)
    assert refused.step() is DeviceState.HEALTHY


def test_only_who_serves_keeps_alive_what_the_fleet_computes(
    client: redis.Redis, start: Callable[..., Device]
) -> None:
    serves, refused = start(), start(OTHER)
    client.expire(keys.golden(), 5)
    refused.step()
    assert client.ttl(keys.golden()) <= 5
    serves.step()
    assert client.ttl(keys.golden()) > 5


def test_who_serves_says_again_what_a_server_forgot(client: redis.Redis, device: Device) -> None:
    client.delete(keys.golden())
    device.step()
    stored: Any = client.get(keys.golden())
    assert GoldenVectors.from_json(stored).disagreement(GOLDEN) is None
    assert 0 < client.ttl(keys.golden()) <= LEASE_S


def test_a_full_server_keeps_nobody_from_joining_and_staying(
    client: redis.Redis, start: Callable[..., Device]
) -> None:
    with full_memory(client):
        one, two = start(), start()
        assert (one.step(), two.step()) == (DeviceState.HEALTHY, DeviceState.HEALTHY)
        client.delete(keys.golden())
        assert one.step() is DeviceState.HEALTHY
        assert client.exists(keys.golden())


# --- evaluations ---------------------------------------------------------------------------------


def test_a_device_evaluates_itself_when_it_is_asked(device: Device) -> None:
    device.step(1.0)
    assert not device.evaluated
    device.monitor.ask(memory=False)
    device.step(1.0)
    device.step(1.0)
    assert len(device.evaluated) == 1
    assert not device.looked_at_memory


def test_a_device_nobody_asks_evaluates_itself_now_and_then(device: Device) -> None:
    device.steps(UNASKED * CHECK_EVERY_S - 1, busy=True)
    assert not device.evaluated
    device.steps(1, busy=True)
    assert len(device.evaluated) == 1
    device.steps(UNASKED * CHECK_EVERY_S, busy=True)
    assert len(device.evaluated) == 2


def test_who_is_asked_often_enough_does_not_evaluate_itself(device: Device) -> None:
    for turn in range(1, 6):
        device.steps(CHECK_EVERY_S, busy=True)
        device.monitor.ask(memory=False)
        device.step()
        assert len(device.evaluated) == turn


def test_memory_is_looked_at_first_then_when_asked_and_then_now_and_then(
    start: Callable[..., Device],
) -> None:
    device = start()
    device.step(1.0)
    assert device.looked_at_memory == 1
    assert device.monitor.verdict.memory == device.memory
    device.monitor.ask(memory=True)
    device.memory = Memory(60, 100, "a test")
    device.step(1.0)
    assert device.looked_at_memory == 2
    assert device.evaluated == [0.6]
    device.steps(UNASKED * MEMORY_EVERY_S - 1, busy=True)
    assert device.looked_at_memory == 2
    device.steps(1, busy=True)
    assert device.looked_at_memory == 3


def test_who_is_asked_twice_before_it_looks_forgets_neither_question(device: Device) -> None:
    device.monitor.ask(memory=True)
    device.monitor.ask(memory=False)
    device.step(1.0)
    assert (len(device.evaluated), device.looked_at_memory) == (1, 1)


def test_a_slow_device_is_degraded_until_it_is_not(device: Device) -> None:
    device.measured = SLOW
    device.monitor.ask(memory=False)
    assert device.step(1.0) is DeviceState.DEGRADED
    assert device.reason.startswith("Latency degradation detected")
    assert device.monitor.takes_work
    device.measured = WELL
    assert device.step(1.0) is DeviceState.DEGRADED  # until it looks again
    device.monitor.ask(memory=False)
    assert device.step(1.0) is DeviceState.HEALTHY
    assert device.reason == ""


def test_a_report_holds_everything_that_is_known(device: Device) -> None:
    device.measured = SLOW
    device.monitor.ask(memory=True)
    device.step(1.0)
    report = device.monitor.report()
    assert report["state"] == "degraded"
    assert (report["is_healthy"], report["performance_degraded"]) == (False, True)
    assert (report["high_error_rate"], report["memory_pressure"]) == (False, False)
    assert report["reason"] == report["warnings"][0]
    assert (report["memory"], report["memory_share"]) == (asdict(device.memory), 0.5)


def test_before_anything_is_known_a_report_says_so(client: redis.Redis) -> None:
    report = Device(client).monitor.report()
    assert (report["state"], report["reason"]) == ("starting", "")
    assert (report["memory"], report["memory_share"]) == (asdict(UNKNOWN), None)


# --- a device checks itself ----------------------------------------------------------------------


def test_an_idle_device_checks_itself(device: Device) -> None:
    device.steps(IDLE_S - 1)
    assert not device.exercised
    device.steps(1)
    assert len(device.exercised) == 1
    device.steps(2 * IDLE_S)  # a model that is busy is asked once
    assert len(device.exercised) == 1
    assert device.answer() is DeviceState.HEALTHY
    device.steps(IDLE_S - 1)
    assert len(device.exercised) == 1
    device.steps(1)
    assert len(device.exercised) == 2


def test_a_device_at_work_does_not_check_itself(device: Device) -> None:
    device.steps(4 * IDLE_S, busy=True)
    assert not device.exercised
    device.steps(IDLE_S)
    assert len(device.exercised) == 1


@pytest.mark.parametrize("how", ["other vectors", "an error"])
def test_a_device_that_fails_its_check_is_unhealthy(device: Device, how: str) -> None:
    device.steps(IDLE_S)
    if how == "an error":
        device.exercised[-1].set_exception(RuntimeError("the driver is gone"))
        state = device.step()
    else:
        state = device.answer(WRONG)
    assert state is DeviceState.UNHEALTHY
    assert device.reason == "its vectors of known texts changed"
    assert device.monitor.takes_work  # work goes there only while nobody else stands


@pytest.mark.parametrize("busy", [False, True])
def test_an_unhealthy_device_comes_back_over_two_checks(device: Device, busy: bool) -> None:
    device.steps(IDLE_S)
    device.answer(WRONG)
    for turn, expected in ((2, DeviceState.PROBING), (3, DeviceState.HEALTHY)):
        device.steps(PROBE_EVERY_S - 1, busy=busy)
        assert len(device.exercised) == turn - 1
        device.steps(1, busy=busy)
        assert len(device.exercised) == turn
        assert device.answer() is expected
    assert device.reason == ""


def test_an_unhealthy_device_does_not_come_back_without_a_check(device: Device) -> None:
    device.steps(IDLE_S)
    device.answer(WRONG)
    for _ in range(5):
        device.monitor.ask(memory=False)
        assert device.step() is DeviceState.UNHEALTHY


def test_a_probed_device_that_fails_again_is_unhealthy_again(device: Device) -> None:
    device.steps(IDLE_S)
    device.answer(WRONG)
    device.steps(PROBE_EVERY_S)
    assert device.answer() is DeviceState.PROBING
    device.steps(PROBE_EVERY_S)
    assert device.answer(WRONG) is DeviceState.UNHEALTHY


def test_a_device_whose_texts_fail_is_unhealthy_until_they_do_not(device: Device) -> None:
    device.measured = FAILING
    device.monitor.ask(memory=False)
    assert device.step(1.0) is DeviceState.UNHEALTHY
    assert device.reason.startswith("High error rate detected")
    device.steps(PROBE_EVERY_S)
    assert device.answer() is DeviceState.UNHEALTHY  # known texts are not all there is
    device.measured = WELL
    device.steps(PROBE_EVERY_S)
    assert device.answer() is DeviceState.PROBING


def test_what_failed_on_known_texts_is_unhealthy_at_the_next_step(device: Device) -> None:
    device.monitor.suspect()
    assert device.step() is DeviceState.UNHEALTHY
    assert device.reason == "its vectors of known texts changed"
    device.steps(PROBE_EVERY_S)
    assert device.answer() is DeviceState.PROBING


def test_a_suspicion_outweighs_a_check_that_passed_before_it(device: Device) -> None:
    device.steps(IDLE_S)
    device.monitor.suspect()
    assert device.answer() is DeviceState.UNHEALTHY


def test_a_suspicion_while_it_evaluates_is_not_forgotten(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It comes from the model's thread.
    def measurements(_: float | None) -> HealthMeasurements:
        device.monitor.suspect()
        return WELL

    monkeypatch.setattr(device, "measurements", measurements)
    device.monitor.ask(memory=False)
    device.step()
    assert device.step() is DeviceState.UNHEALTHY


def test_a_model_agrees_with_itself_only(device: Device) -> None:
    assert device.monitor.agrees(GOLDEN)
    assert not device.monitor.agrees(WRONG)
    assert device.monitor.agrees(OTHER)  # of a model that was replaced since
    assert device.monitor.exercise() is device.exercised[-1]
