"""What a device says of its streams, and to their producers."""

from dataclasses import replace

import pytest

from sutra_tasks.engines.simulated_engine import SimulatedEncoder
from sutra_tasks.settings import Settings
from sutra_tasks.streaming import upkeep
from sutra_tasks.streaming.backpressure import Level
from sutra_tasks.streaming.metrics import StreamMetrics
from sutra_tasks.streaming.units import Cutter
from sutra_tasks.streaming.upkeep import Upkeep
from tests.unit.fake_streams import AWAY, FakeServer, entry


class Clock:
    """What ``upkeep`` takes for the module ``time``."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    one = Clock()
    monkeypatch.setattr(upkeep, "time", one)
    return one


def upkeep_of(server: FakeServer) -> Upkeep:
    options = Settings(stream_buffer_size=100)
    return Upkeep(server, None, options, lambda: 0.0)  # type: ignore[arg-type]


def test_the_level_rises_with_the_buffer_and_falls_again(clock: Clock) -> None:
    server = FakeServer()
    one = upkeep_of(server)
    levels = []
    for size in (10, 71, 65, 59, 10):
        server.state = replace(server.state, size=size)
        one.step(["s"], [])
        levels.append(server.published[-1]["level"])
        clock.now += 1
    assert levels == [Level.NORMAL, Level.MODERATE, Level.MODERATE, Level.NORMAL, Level.NORMAL]
    assert server.done["guard"] == server.done["rest"] == 5


def test_larger_batches_are_wanted_while_any_stream_is_under_pressure(clock: Clock) -> None:
    server = FakeServer()
    one = upkeep_of(server)
    server.sizes = {"full": 90, "empty": 0}
    assert not one.pressed
    one.step(["full", "empty"], [])
    assert one.pressed
    clock.now += upkeep.PRESSED_S
    assert not one.pressed  # somebody else may have looked since, and found less


def test_the_rate_is_what_was_delivered_of_late_on_all_devices(clock: Clock) -> None:
    server = FakeServer()
    server.state = replace(server.state, loads={"me": 0.0, "other": 0.0})
    one = upkeep_of(server)
    for chunks in (0, 500, 700, 0):
        one._add("s", StreamMetrics(chunks=chunks))
        one.step(["s"], [])
        clock.now += 1
    assert [said["per_s"] for said in server.published] == [0.0, 1000.0, 1400.0, 0.0]


def test_what_is_held_is_refreshed_even_where_nothing_can_be_said(clock: Clock) -> None:
    server = FakeServer()
    server.failures["say_load"].append(AWAY)
    one = upkeep_of(server)
    unit = Cutter(SimulatedEncoder(), Settings()).of_entry("s", entry(7), 0.0)
    with pytest.raises(type(AWAY)):
        one.step(["s"], [unit])
    assert server.refreshed == {b"7-0": 1}


def test_the_last_minute_is_reported(clock: Clock) -> None:
    server = FakeServer()
    one = upkeep_of(server)
    one._add("s", StreamMetrics(chunks=3))
    one.claimed("s", 2)
    one.given_up("s")
    one.step(["s"], [])
    said = StreamMetrics.from_json(server.reports[-1]["s"])
    assert (said.chunks, said.claimed, said.errors) == (3, 2, 1)
    clock.now += 61
    one.step(["s"], [])
    assert StreamMetrics.from_json(server.reports[-1]["s"]) == StreamMetrics()
