"""Upkeep: levels of backpressure, rates, refreshes and reports."""

from dataclasses import replace
from typing import Any

import pytest

from sutra_tasks.engines.simulated_engine import SimulatedEncoder
from sutra_tasks.settings import Settings
from sutra_tasks.streaming.backpressure import Level
from sutra_tasks.streaming.consumer import recorder, upkeep
from sutra_tasks.streaming.consumer.faults import StreamFaults
from sutra_tasks.streaming.consumer.recorder import Recorder
from sutra_tasks.streaming.consumer.tokenizing import StreamTokenizer
from sutra_tasks.streaming.consumer.upkeep import Upkeep
from sutra_tasks.streaming.metrics import StreamMetrics
from tests.unit.fake_streams import AWAY, REFUSED, FakeStore, entry


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
    monkeypatch.setattr(recorder, "time", one)
    return one


def upkeep_of(
    store: FakeStore, measured: Recorder | None = None, faults: StreamFaults | None = None
) -> Upkeep:
    fake: Any = store
    options = Settings(stream_buffer_size=100)
    return Upkeep(
        fake, fake, measured or new_recorder(), options, lambda: 0.0, faults=faults or StreamFaults()
    )


def new_recorder() -> Recorder:
    no_batcher: Any = None
    return Recorder(no_batcher)


def test_the_level_rises_with_the_buffer_and_falls_again(clock: Clock) -> None:
    store = FakeStore()
    one = upkeep_of(store)
    levels = []
    for size in (10, 71, 65, 59, 10):
        store.state = replace(store.state, size=size)
        one.step(["s"], [])
        levels.append(store.published[-1]["level"])
        clock.now += 1
    assert levels == [Level.NORMAL, Level.MODERATE, Level.MODERATE, Level.NORMAL, Level.NORMAL]
    assert store.done["enforce_hard_limit"] == store.done["flush_texts"] == 5


def test_batches_are_larger_while_any_stream_is_under_pressure(clock: Clock) -> None:
    store = FakeStore()
    one = upkeep_of(store)
    store.sizes = {"full": 90, "empty": 0}
    assert not one.under_pressure()
    one.step(["full", "empty"], [])
    assert one.under_pressure()
    clock.now += upkeep.PRESSURE_S
    assert not one.under_pressure()  # another device may have found less since


def test_the_rate_is_what_was_delivered_of_late_on_all_devices(clock: Clock) -> None:
    store = FakeStore()
    store.state = replace(store.state, loads={"me": 0.0, "other": 0.0})
    measured = new_recorder()
    one = upkeep_of(store, measured)
    for chunks in (0, 500, 700, 0):
        measured.add("s", StreamMetrics(chunks=chunks))
        one.step(["s"], [])
        clock.now += 1
    assert [said["per_s"] for said in store.published] == [0.0, 1000.0, 1400.0, 0.0]


def test_taken_entries_are_refreshed_even_if_reports_fail(clock: Clock) -> None:
    store = FakeStore()
    store.failures["report_load"].append(AWAY)
    one = upkeep_of(store)
    item = StreamTokenizer(SimulatedEncoder(), Settings()).entry_item("s", entry(7), 0.0)
    with pytest.raises(type(AWAY)):
        one.step(["s"], [item])
    assert store.refreshed == {b"7-0": 1}


def test_a_stream_that_cannot_be_looked_after_costs_no_other_one_its_upkeep(clock: Clock) -> None:
    store, faults = FakeStore(), StreamFaults()
    one = upkeep_of(store, faults=faults)
    store.failures["flush_texts"].append(REFUSED)
    one.step(["bad", "good"], [])
    assert len(store.published) == 1
    assert store.reports[-1]["bad"]["faults"] == ["upkeep: WRONGTYPE"]
    assert "good" not in store.reports[-1]
    clock.now += 1
    one.step(["bad", "good"], [])
    assert len(store.published) == 3
    assert "bad" not in store.reports[-1]


def test_the_last_minute_is_reported(clock: Clock) -> None:
    store = FakeStore()
    measured = new_recorder()
    one = upkeep_of(store, measured)
    measured.add("s", StreamMetrics(chunks=3))
    measured.claimed("s", 2)
    measured.dead_lettered("s")
    one.step(["s"], [])
    said = StreamMetrics.from_json(store.reports[-1]["s"])
    assert (said.chunks, said.claimed, said.errors) == (3, 2, 1)
    clock.now += 61
    one.step(["s"], [])
    assert StreamMetrics.from_json(store.reports[-1]["s"]) == StreamMetrics()
