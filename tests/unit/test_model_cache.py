"""The models of one device: which is meant, which are in memory, and which leave."""

import threading
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest

from sutra_tasks.engines.encoder import gives_space
from sutra_tasks.engines.simulated_engine import SimulatedEncoder
from sutra_tasks.errors import InvalidOptionError, ModelError, SpaceUnavailableError
from sutra_tasks.models.loaded import loading
from sutra_tasks.models.loaded.eviction import SUPERSEDED_S
from sutra_tasks.models.loaded.freeing import EvictedModels
from sutra_tasks.models.loaded.model_cache import PATIENCE_S, RETRY_S, SLOW_S, ModelCache
from sutra_tasks.models.loaded.waiting_places import Crowded, WaitingPlaces
from tests.conftest import wait_until
from tests.unit.fake_registry import OPTIONS, Service, Store, engine, models_of


@pytest.fixture(autouse=True)
def _memory_is_freed_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare each eviction a pass of the garbage collector; ``test_freeing.py`` has the laws of it."""
    monkeypatch.setattr(EvictedModels, "free", lambda _: None)


@pytest.fixture
def now() -> list[float]:
    return [0.0]


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch, store: Store, now: list[float]) -> ModelCache:
    return models_of(monkeypatch, store, lambda: now[0])


def test_a_call_without_a_model_gets_the_default(models: ModelCache) -> None:
    for name in (None, "search", "search@1"):
        assert models.get(name).reference == "search@1"


def test_a_model_that_may_not_be_named_is_refused_with_those_that_may(models: ModelCache) -> None:
    with pytest.raises(InvalidOptionError, match="docs, extra, other, search"):
        models.get("../../etc")


def test_a_named_model_is_loaded_once_and_then_there(models: ModelCache) -> None:
    assert not models.has("extra")
    first = models.get("extra")
    assert models.get("extra") is first
    assert "extra" in models.names


def test_a_version_may_be_named(models: ModelCache) -> None:
    assert models.get("search@2").reference == "search@2"
    assert models.get(None).reference == "search@1"


def test_the_least_recently_used_leaves_and_the_default_never(
    models: ModelCache, now: list[float]
) -> None:
    for name in ("extra", "docs", "other"):  # 4 MB each beside the default, of 10
        now[0] += 1
        models.get(name)
    assert models.has("other")
    assert models.has("search@1")
    assert not models.has("extra")
    assert not models.has("docs@1")


def test_what_is_kept_for_a_promotion_stays(models: ModelCache, now: list[float]) -> None:
    models.protect("search@2")
    models.load("search@2")
    now[0] += 1
    models.get("extra")
    models.get("other")
    assert models.has("search@2")


def test_threads_that_ask_at_once_share_one_loading(
    models: ModelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads, begun, go_on = [], threading.Event(), threading.Event()

    def slowly(_: Any, reference: str, folder: Any = None) -> SimulatedEncoder:
        loads.append(reference)
        begun.set()
        go_on.wait(10)
        return engine(reference)

    monkeypatch.setattr(loading, "load_engine", slowly)
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(models.get("extra"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    begun.wait(10)
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert loads == ["extra"]
    assert len(set(map(id, found))) == 1


def test_a_failed_loading_fails_every_one_who_waits_and_is_tried_again(
    models: ModelCache, store: Store
) -> None:
    store.broken.add("search@2")
    for _ in range(2):
        with pytest.raises(ModelError, match="differs"):
            models.load("search@2")
    store.broken.clear()
    assert models.load("search@2").reference == "search@2"


def test_a_version_whose_vectors_are_others_than_its_manifest_says_is_refused(
    models: ModelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = engine("search@3")
    other.info = replace(other.info, space=engine("search@2").info.space)
    monkeypatch.setattr(loading, "load_engine", lambda *_: other)
    with pytest.raises(ModelError, match="vectors differ"):
        models.load("search@2")
    assert not models.has("search@2")


def test_a_pinned_space_is_given_by_the_version_that_has_it(models: ModelCache, store: Store) -> None:
    old = models.default.encoder.info.space
    store.serves["search"] = 2
    models.set_default(models.load("search@2"))
    assert models.get(None).encoder.info.space != old
    assert models.get(None, old).reference == "search@1"
    assert models.get("search", old).reference == "search@1"


def test_a_pinned_space_nobody_has_is_an_error_that_says_what_there_is(models: ModelCache) -> None:
    with pytest.raises(SpaceUnavailableError) as refused:
        models.get(None, "another:4")
    assert refused.value.found == models.default.encoder.info.space


def test_a_pinned_space_counts_with_the_width_it_is_cut_to(models: ModelCache) -> None:
    name, _, _ = models.default.encoder.info.space.rpartition(":")
    assert models.get(None, f"{name}:2", 2).reference == "search@1"
    with pytest.raises(SpaceUnavailableError):
        models.get(None, f"{name}:2")


def test_a_version_that_serves_no_more_goes_when_nobody_asks_for_it(
    models: ModelCache, store: Store, now: list[float]
) -> None:
    models.set_default(models.load("search@2"))
    store.serves["search"] = 2
    models.serving.refresh()
    models.evict_superseded()
    assert models.has("search@1")
    now[0] += SUPERSEDED_S + 1
    models.evict_superseded()
    assert not models.has("search@1")
    assert models.has("search@2")


def test_of_a_named_model_the_version_before_serves_on_when_the_new_one_fails(
    models: ModelCache, store: Store
) -> None:
    assert models.get("docs").reference == "docs@1"
    store.serves["docs"], store.broken = 2, {"docs@2"}
    models.serving.refresh()
    assert models.get("docs").reference == "docs@1"
    with pytest.raises(ModelError):
        models.get("docs@2")


def test_a_pin_is_of_the_space_and_the_width() -> None:
    info = engine("search@1").info
    name, _, _ = info.space.rpartition(":")
    assert gives_space(info, info.space, None)
    assert gives_space(info, f"{name}:2", 2)
    assert not gives_space(info, info.space, 2)
    assert not gives_space(info, "other:4", None)


def test_what_is_in_memory_needs_no_disk(monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
    models = models_of(monkeypatch, store, lambda: 0.0, replace(OPTIONS, model_memory_mb=100))
    models.get("docs")
    models.get("extra")
    store.is_away = True
    store.reads.clear()
    for model, reference in (
        (None, "search@1"), ("search", "search@1"), ("docs", "docs@1"), ("docs@1", "docs@1"),
        ("extra", "extra"),
    ):  # fmt: skip
        assert models.get(model).reference == reference
    assert models.get(None, models.default.encoder.info.space) is models.default
    assert models.has("docs")
    assert models.names == ("docs", "docs@1", "extra", "search", "search@1")
    models.evict_superseded()
    assert store.reads == []


def test_what_was_known_goes_on_while_the_registry_cannot_be_read(
    models: ModelCache, store: Store
) -> None:
    models.get("docs")
    store.is_away = True
    models.serving.refresh()
    assert models.serving.of("docs") == "docs@1"
    store.is_away, store.serves["docs"] = False, 2
    models.serving.refresh()
    assert models.get("docs").reference == "docs@2"


def test_a_model_that_cannot_be_read_keeps_no_other_from_being_followed(
    models: ModelCache, store: Store
) -> None:
    models.get("docs")
    store.unreadable.add("search")
    store.serves["docs"] = 2
    models.serving.refresh()
    assert models.serving.of("docs") == "docs@2"
    assert models.serving.of("search") == "search@1"


def test_a_version_may_be_named_though_which_one_serves_cannot_be_read(
    models: ModelCache, store: Store
) -> None:
    store.unreadable.add("docs")
    assert models.get("docs@2").reference == "docs@2"
    store.unreadable.clear()
    models.serving.refresh()
    assert models.serving.of("docs") == "docs@1"


def test_one_loading_reads_the_files_and_the_manifest_once(models: ModelCache, store: Store) -> None:
    store.reads.clear()
    models.load("docs@2")
    assert store.reads == ["verify", "folder"]


def test_a_version_that_is_pinned_again_and_again_stays(
    models: ModelCache, store: Store, now: list[float]
) -> None:
    old = models.default.encoder.info.space
    store.serves["search"] = 2
    models.serving.refresh()
    models.set_default(models.load("search@2"))
    first = models.get(None, old)
    for _ in range(3):
        now[0] += 0.7 * SUPERSEDED_S
        assert models.get(None, old) is first
        models.evict_superseded()


def test_for_calls_a_model_that_failed_is_not_loaded_again_for_a_while(
    models: ModelCache, store: Store, now: list[float]
) -> None:
    store.broken.add("docs@2")
    for _ in range(3):
        with pytest.raises(ModelError, match="differs"):
            models.get("docs@2")
    assert store.reads.count("verify") == 2  # the default's, and once this one's
    now[0] += RETRY_S
    store.broken.clear()
    assert models.get("docs@2").reference == "docs@2"


def test_of_a_named_model_the_version_before_serves_on_whatever_the_new_one_raises(
    models: ModelCache, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> SimulatedEncoder:
        raise RuntimeError("CUDA out of memory")

    models.get("docs")
    store.serves["docs"] = 2
    models.serving.refresh()
    monkeypatch.setattr(loading, "load_engine", full)
    assert models.get("docs").reference == "docs@1"
    with pytest.raises(ModelError, match="RuntimeError: CUDA out of memory"):
        models.load("docs@2")


def test_versions_of_one_model_make_room_for_each_other(
    models: ModelCache, store: Store, now: list[float]
) -> None:
    models.get("docs")
    for version in (2, 3):  # 4 MB each, beside the default and the one that serves there is no room
        now[0] += 1
        with pytest.raises(ModelError, match=r"4 MB beside 8 MB .* SUTRA_MODEL_MEMORY_MB is 10"):
            models.get(f"docs@{version}")
    assert store.reads.count("folder") == 2  # of the two that were loaded: these were not begun
    assert models.names == ("docs", "docs@1", "search", "search@1")


def test_a_version_that_comes_to_serve_takes_the_place_of_the_one_before(
    models: ModelCache, store: Store
) -> None:
    models.get("docs")
    store.serves["docs"] = 2
    models.serving.refresh()
    assert models.get("docs").reference == "docs@2"
    assert not models.has("docs@1")


def test_a_candidate_and_a_new_default_come_though_there_is_no_room(
    monkeypatch: pytest.MonkeyPatch, store: Store
) -> None:
    tight = replace(OPTIONS, model_memory_mb=5)
    models = models_of(monkeypatch, store, lambda: 0.0, tight)
    with pytest.raises(ModelError, match="SUTRA_MODEL_MEMORY_MB"):
        models.get("extra")
    models.protect("search@2")
    assert models.load("search@2").reference == "search@2"
    models.protect(None)
    store.serves["search"] = 3
    models.serving.refresh()
    assert models.load("search@3").reference == "search@3"


def test_the_first_model_is_held_against_its_manifest(
    monkeypatch: pytest.MonkeyPatch, store: Store
) -> None:
    other = engine("search@3")
    other.info = replace(other.info, space=engine("search@1").info.space)
    monkeypatch.setattr(loading, "load_engine", lambda *_: other)
    models = ModelCache(OPTIONS, store)  # type: ignore[arg-type]
    first = models.load_default()
    with pytest.raises(ModelError, match="vectors differ"):
        models.start(first, Service)  # type: ignore[arg-type]


def test_whatever_serves_by_default_is_in_memory(models: ModelCache) -> None:
    loaded = models.load("search@2")
    models._cached.clear()
    models.set_default(loaded)
    assert models.has("search@2")


def test_a_model_is_found_by_its_space_whatever_its_name(models: ModelCache) -> None:
    extra = models.get("extra")
    assert models.find_by_space(extra.encoder.info.space) is extra
    assert models.find_by_space("another:4") is None


def test_a_model_that_hangs_holds_up_a_quarter_of_the_threads_and_no_call_for_another(
    monkeypatch: pytest.MonkeyPatch, store: Store, now: list[float]
) -> None:
    options = replace(OPTIONS, task_threads=8)
    models = models_of(monkeypatch, store, lambda: now[0], options)
    go_on = threading.Event()

    def slowly(_: Any, reference: str, folder: Any = None) -> SimulatedEncoder:
        assert reference != "extra" or go_on.wait(10)
        return engine(reference)

    monkeypatch.setattr(loading, "load_engine", slowly)
    found: list[Any] = []
    waiting = [threading.Thread(target=lambda: found.append(models.get("extra"))) for _ in range(2)]
    for thread in waiting:
        thread.start()
    wait_until(lambda: models._places.waiting_for("extra") == 2)
    with pytest.raises(Crowded):
        models.get("extra")
    assert models.get(None).reference == "search@1"
    assert models.get("docs").reference == "docs@1"
    assert models.loading == ""
    now[0] += SLOW_S + 1
    assert models.loading.startswith("extra is being loaded, for 11 s now")
    go_on.set()
    for thread in waiting:
        thread.join(10)
    assert [one.reference for one in found] == ["extra", "extra"]
    assert models.loading == ""
    assert models.get("other").reference == "other"


def test_a_model_that_loads_for_long_fails_its_calls_at_once_until_it_is_there(
    monkeypatch: pytest.MonkeyPatch, models: ModelCache, now: list[float]
) -> None:
    go_on = threading.Event()

    def slowly(_: Any, reference: str, folder: Any = None) -> SimulatedEncoder:
        assert go_on.wait(10)
        return engine(reference)

    monkeypatch.setattr(loading, "load_engine", slowly)
    first = threading.Thread(target=lambda: models.get("extra"))
    first.start()
    wait_until(lambda: "extra" in models._loads.running())
    now[0] += PATIENCE_S + 1
    for _ in range(2):
        with pytest.raises(ModelError, match="being loaded, for 121 s"):
            models.get("extra")
    go_on.set()
    first.join(10)
    assert models.get("extra").reference == "extra"


def test_a_registry_that_hangs_holds_up_no_call_for_a_model_in_memory(
    monkeypatch: pytest.MonkeyPatch, models: ModelCache, store: Store, now: list[float]
) -> None:
    go_on = threading.Event()

    def has(_: str) -> bool:
        assert go_on.wait(10)
        return True

    monkeypatch.setattr(store, "has", has)
    first = threading.Thread(target=lambda: models.get("docs"))
    first.start()
    wait_until(lambda: "docs" in models._lookups.running())
    assert models.get("search").reference == "search@1"
    now[0] += PATIENCE_S + 1
    with pytest.raises(ModelError, match="the registry does not answer"):
        models.get("docs")
    go_on.set()
    first.join(10)


def test_a_device_tells_that_it_loads_its_first_model(store: Store) -> None:
    starting = ModelCache(OPTIONS, store, clock=lambda: 0.0)  # type: ignore[arg-type]
    assert starting.loading == "search is being loaded, for 0 s now"


@pytest.mark.parametrize(
    ("threads", "for_one", "for_all"), [(64, 16, 48), (8, 2, 6), (4, 1, 3), (1, 1, 1)]
)
def test_a_quarter_waits_for_one_model_and_three_for_all(
    threads: int, for_one: int, for_all: int
) -> None:
    places = WaitingPlaces(threads)
    with ExitStack() as waiting:
        for at in range(for_all):
            waiting.enter_context(places.place(f"m{at // for_one}"))
            assert places.waiting_for(f"m{at // for_one}") == at % for_one + 1
            if at + 1 == for_one:
                with pytest.raises(Crowded), places.place("m0"):
                    pass
        with pytest.raises(Crowded), places.place("another"):
            pass
    assert places.waiting_for("m0") == 0
    with places.place("another"):
        pass
