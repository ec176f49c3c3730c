"""The fleet's golden vectors are those of the model that serves, also of one loaded meanwhile."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from sutra_tasks.engines.golden import GoldenVectors
from sutra_tasks.engines.simulated_engine import SimulatedEncoder
from sutra_tasks.health.memory import UNKNOWN
from sutra_tasks.health.monitor import Monitor
from sutra_tasks.health.states import DeviceState, HealthMeasurements
from sutra_tasks.settings import Settings

OLD, NEW = (GoldenVectors.of(SimulatedEncoder(model=name, width=4)) for name in ("old", "new"))


class Server:
    """Keeps the fleet's golden vectors; ``before`` runs before each command, as another thread might."""

    def __init__(self) -> None:
        self.kept: str | None = None
        self.before: Callable[[], None] = lambda: None

    def evalsha(self, _: str, __: int, ___: str, said: str, ____: int) -> str | None:
        found = self.kept
        self.kept = self.kept or said
        self.before()
        return found

    def set(self, _: str, said: str, ex: int) -> None:  # noqa: ARG002 - redis's
        self.kept = said
        self.before()

    def expire(self, *_: object) -> bool:
        self.before()
        return self.kept is not None


class Idle:
    batches = 0

    def measurements(self, _: float | None) -> HealthMeasurements:
        return HealthMeasurements(0.01, 0.01, 1000, 0, None)


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def monitor(server: Server) -> Monitor:
    client: Any = server
    statistics: Any = Idle()
    return Monitor(Settings(), client, statistics, memory=lambda: UNKNOWN, clock=lambda: 0.0)


def exercise() -> Future[GoldenVectors]:
    return Future()


def loads_once(monitor: Monitor, golden: GoldenVectors, server: Server) -> Callable[[], None]:
    def load() -> None:
        server.before = lambda: None
        monitor.loaded(golden, exercise)

    return load


def test_a_device_that_goes_on_with_another_model_tells_its_vectors(
    monitor: Monitor, server: Server
) -> None:
    for golden in (OLD, NEW, OLD):
        monitor.loaded(golden, exercise)
        assert monitor.step().state is DeviceState.HEALTHY
        assert server.kept == golden.to_json()


def test_a_model_that_comes_while_another_is_told_is_told_next(monitor: Monitor, server: Server) -> None:
    third = GoldenVectors.of(SimulatedEncoder(model="third", width=4))
    monitor.loaded(OLD, exercise)
    for golden in (NEW, third):  # while it joins; while it keeps what it said
        server.before = loads_once(monitor, golden, server)
        monitor.step()
        monitor.step()
        assert server.kept == golden.to_json()
    monitor.loaded(OLD, exercise)
    server.before = loads_once(monitor, NEW, server)  # while it tells of another
    monitor.step()
    monitor.step()
    assert server.kept == NEW.to_json()


def test_what_was_told_is_not_told_again(monitor: Monitor, server: Server) -> None:
    monitor.loaded(OLD, exercise)
    monitor.step()
    server.kept = NEW.to_json()  # by a device that went on before
    monitor.step()
    assert server.kept == NEW.to_json()
