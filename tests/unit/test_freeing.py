"""What is left of a model that left is freed, though it refers to itself."""

import gc
import weakref
from collections.abc import Iterator

import pytest

from sutra_tasks.models.loaded.freeing import AGAIN_S, NEW_OBJECTS, EvictedModels, freeze_loaded_objects


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
    departed, engine = EvictedModels(), Engine()
    left = weakref.ref(engine.module)
    departed.add(engine)
    del engine
    assert left() is not None
    departed.collect()
    assert left() is None


def test_what_left_is_freed_though_it_was_settled(settled: None) -> None:
    departed, engine = EvictedModels(), Engine()
    left = weakref.ref(engine.module)
    freeze_loaded_objects()
    assert gc.get_threshold()[0] == NEW_OBJECTS
    departed.add(engine)
    del engine
    departed.collect()
    assert left() is None
    assert gc.get_freeze_count() > 0


def test_what_was_still_in_use_is_freed_when_it_is_no_more() -> None:
    departed, engine = EvictedModels(), Engine()
    left = weakref.ref(engine.module)
    departed.add(engine)
    departed.collect()
    assert left() is not None
    del engine
    departed.collect()
    assert left() is None


def test_an_engine_that_refers_to_itself_is_freed_after_a_while() -> None:
    now = [0.0]
    departed, module = EvictedModels(clock=lambda: now[0]), Module()
    left = weakref.ref(module)
    departed.add(module)
    departed.collect()
    del module
    now[0] += AGAIN_S
    departed.collect()
    assert left() is None


def test_what_a_failed_loading_left_is_freed() -> None:
    departed, module = EvictedModels(), Module()
    left = weakref.ref(module)
    del module
    departed.collect()
    assert left() is not None
    departed.note_failure()
    departed.collect()
    assert left() is None


def test_nothing_is_collected_without_need(monkeypatch: pytest.MonkeyPatch) -> None:
    collections: list[int] = []
    monkeypatch.setattr(gc, "collect", lambda: collections.append(1))
    departed, engine = EvictedModels(clock=lambda: 0.0), Engine()
    departed.collect()
    assert collections == []
    departed.add(engine)
    for _ in range(3):
        departed.collect()
    assert collections == [1]
