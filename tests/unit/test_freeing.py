"""What is left of a model that left is freed, though it refers to itself."""

import gc
import weakref
from collections.abc import Iterator

import pytest

from sutra_tasks.models.loaded.freeing import NEW_OBJECTS, RETRY_S, EvictedModels, freeze_loaded_objects


class Module:
    def __init__(self) -> None:
        self.itself = self


class Engine:
    """As a torch one: it does not refer to itself, but what it holds does."""

    def __init__(self) -> None:
        self.module = Module()


@pytest.fixture(autouse=True)
def by_hand() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def settled() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*before)


def test_what_left_is_freed() -> None:
    evicted, engine = EvictedModels(), Engine()
    left = weakref.ref(engine.module)
    evicted.add(engine)
    del engine
    assert left() is not None
    evicted.free()
    assert left() is None


def test_what_left_is_freed_though_it_was_settled(settled: None) -> None:
    evicted, engine = EvictedModels(), Engine()
    left = weakref.ref(engine.module)
    freeze_loaded_objects()
    assert gc.get_threshold()[0] == NEW_OBJECTS
    evicted.add(engine)
    del engine
    evicted.free()
    assert left() is None
    assert gc.get_freeze_count() > 0


def test_what_was_still_in_use_is_freed_when_it_is_no_more() -> None:
    evicted, engine = EvictedModels(), Engine()
    left = weakref.ref(engine.module)
    evicted.add(engine)
    evicted.free()
    assert left() is not None
    del engine
    evicted.free()
    assert left() is None


def test_an_engine_that_refers_to_itself_is_freed_after_a_while() -> None:
    now = [0.0]
    evicted, module = EvictedModels(clock=lambda: now[0]), Module()
    left = weakref.ref(module)
    evicted.add(module)
    evicted.free()
    del module
    now[0] += RETRY_S
    evicted.free()
    assert left() is None


def test_what_a_failed_loading_left_is_freed() -> None:
    evicted, module = EvictedModels(), Module()
    left = weakref.ref(module)
    del module
    evicted.free()
    assert left() is not None
    evicted.note_failed_load()
    evicted.free()
    assert left() is None


def test_nothing_is_collected_without_need(monkeypatch: pytest.MonkeyPatch) -> None:
    collections: list[int] = []
    monkeypatch.setattr(gc, "collect", lambda: collections.append(1))
    evicted, engine = EvictedModels(clock=lambda: 0.0), Engine()
    evicted.free()
    assert collections == []
    evicted.add(engine)
    for _ in range(3):
        evicted.free()
    assert collections == [1]
