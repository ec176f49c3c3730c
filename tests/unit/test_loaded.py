"""The models of one device: which is meant, which are in memory, and which leave."""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sutra_tasks.encoding import loaded as module
from sutra_tasks.encoding.encoder import Encoder, check_pin
from sutra_tasks.encoding.golden import Golden
from sutra_tasks.encoding.loaded import SUPERSEDED_S, Models, leaving
from sutra_tasks.encoding.simulated import SimulatedEncoder
from sutra_tasks.errors import InvalidOptionError, ModelError, SpaceUnavailableError
from sutra_tasks.settings import Settings

OPTIONS = Settings(engine="simulated", model="search", models="extra, other", model_memory_mb=10)
MB = 1_000_000


class Manifest:
    def __init__(self, encoder: Encoder) -> None:
        self.space, self.bytes = encoder.card.space, encoder.card.weight_bytes
        self.golden = Golden.of(encoder).to_json()


class Store:
    """A registry in memory with the versions of one model."""

    def __init__(self) -> None:
        self.serves: dict[str, int] = {"search": 1, "docs": 1}
        self.broken: set[str] = set()

    def names(self) -> list[str]:
        return sorted(self.serves)

    def current(self, name: str) -> int | None:
        return self.serves[name]

    def resolve(self, reference: str) -> tuple[str, int]:
        name, _, version = reference.partition("@")
        return name, int(version or self.serves[name])

    def verify(self, name: str, version: int) -> None:
        if f"{name}@{version}" in self.broken:
            raise ModelError(f"{name}@{version}", "model.safetensors differs")

    def folder(self, name: str, version: int) -> Path:
        return Path(name) / str(version)

    def manifest(self, name: str, version: int) -> Manifest:
        return Manifest(engine(f"{name}@{version}"))

    def by_space(self, name: str, space: str) -> int | None:
        spaces = {check: engine(f"{name}@{check}").card.space for check in (1, 2, 3)}
        return next((version for version, one in spaces.items() if one == space), None)


def engine(reference: str) -> SimulatedEncoder:
    made = SimulatedEncoder(model=reference, width=4)
    made.card = replace(made.card, weight_bytes=4 * MB)
    return made


class Service:
    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder


@pytest.fixture
def now() -> list[float]:
    return [0.0]


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch, store: Store, now: list[float]) -> Models:
    monkeypatch.setattr(module, "load_engine", lambda _, reference, folder=None: engine(reference))  # noqa: ARG005
    made = Models(OPTIONS, store, clock=lambda: now[0])  # type: ignore[arg-type]
    made.begin(made.first(), Service)  # type: ignore[arg-type]
    return made


def test_a_call_without_a_model_gets_the_default(models: Models) -> None:
    for name in (None, "search", "search@1"):
        assert models.get(name).reference == "search@1"


def test_a_model_that_may_not_be_named_is_refused_with_those_that_may(models: Models) -> None:
    with pytest.raises(InvalidOptionError, match="docs, extra, other, search"):
        models.get("../../etc")


def test_a_named_model_is_loaded_once_and_then_there(models: Models) -> None:
    assert not models.has("extra")
    first = models.get("extra")
    assert models.get("extra") is first
    assert "extra" in models.names


def test_a_version_may_be_named(models: Models) -> None:
    assert models.get("search@2").reference == "search@2"
    assert models.get(None).reference == "search@1"


def test_the_least_recently_used_leaves_and_the_default_never(models: Models, now: list[float]) -> None:
    for name in ("extra", "docs", "other"):  # 4 MB each beside the default, of 10
        now[0] += 1
        models.get(name)
    assert models.has("other")
    assert models.has("search@1")
    assert not models.has("extra")
    assert not models.has("docs@1")


def test_what_is_kept_for_a_promotion_stays(models: Models, now: list[float]) -> None:
    models.keep("search@2")
    models.load("search@2")
    now[0] += 1
    models.get("extra")
    models.get("other")
    assert models.has("search@2")


def test_threads_that_ask_at_once_share_one_loading(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads, begun, go_on = [], threading.Event(), threading.Event()

    def slowly(_: Any, reference: str, folder: Any = None) -> SimulatedEncoder:
        loads.append(reference)
        begun.set()
        go_on.wait(10)
        return engine(reference)

    monkeypatch.setattr(module, "load_engine", slowly)
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
    models: Models, store: Store
) -> None:
    store.broken.add("search@2")
    for _ in range(2):
        with pytest.raises(ModelError, match="differs"):
            models.load("search@2")
    store.broken.clear()
    assert models.load("search@2").reference == "search@2"


def test_a_version_whose_vectors_are_others_than_its_manifest_says_is_refused(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = engine("search@3")
    other.card = replace(other.card, space=engine("search@2").card.space)
    monkeypatch.setattr(module, "load_engine", lambda *_: other)
    with pytest.raises(ModelError, match="vectors differ"):
        models.load("search@2")
    assert not models.has("search@2")


def test_a_pinned_space_is_given_by_the_version_that_has_it(models: Models, store: Store) -> None:
    old = models.default.encoder.card.space
    store.serves["search"] = 2
    models.serve_by_default(models.load("search@2"))
    assert models.get(None).encoder.card.space != old
    assert models.get(None, old).reference == "search@1"
    assert models.get("search", old).reference == "search@1"


def test_a_pinned_space_nobody_has_is_an_error_that_says_what_there_is(models: Models) -> None:
    with pytest.raises(SpaceUnavailableError) as refused:
        models.get(None, "another:4")
    assert refused.value.found == models.default.encoder.card.space


def test_a_pinned_space_counts_with_the_width_it_is_cut_to(models: Models) -> None:
    name, _, _ = models.default.encoder.card.space.rpartition(":")
    assert models.get(None, f"{name}:2", 2).reference == "search@1"
    with pytest.raises(SpaceUnavailableError):
        models.get(None, f"{name}:2")


def test_a_version_that_serves_no_more_goes_when_nobody_asks_for_it(
    models: Models, store: Store, now: list[float]
) -> None:
    models.serve_by_default(models.load("search@2"))
    store.serves["search"] = 2
    models.drop_superseded()
    assert models.has("search@1")
    now[0] += SUPERSEDED_S + 1
    models.drop_superseded()
    assert not models.has("search@1")
    assert models.has("search@2")


def test_of_a_named_model_the_version_before_serves_on_when_the_new_one_fails(
    models: Models, store: Store
) -> None:
    assert models.get("docs").reference == "docs@1"
    store.serves["docs"], store.broken = 2, {"docs@2"}
    assert models.get("docs").reference == "docs@1"
    with pytest.raises(ModelError):
        models.get("docs@2")


@given(
    st.lists(
        st.tuples(st.uuids().map(str), st.integers(0, 50), st.floats(0, 9)), unique_by=lambda one: one[0]
    ),
    st.integers(-10, 200),
)
def test_those_that_stay_fit_and_were_used_later(held: list[tuple[str, int, float]], room: int) -> None:
    gone = leaving(held, room)
    stay = [one for one in held if one[0] not in gone]
    assert sum(size for _, size, _ in stay) <= max(room, 0) or not stay
    used = {name: at for name, _, at in held}
    assert all(used[name] <= at for name in gone for _, _, at in stay)
    # Nobody leaves without need.
    if gone:
        latest = gone[-1]
        size = next(size for name, size, _ in held if name == latest)
        assert sum(one[1] for one in stay) + size > room


def test_a_pin_is_of_the_space_and_the_width() -> None:
    card = engine("search@1").card
    name, _, _ = card.space.rpartition(":")
    assert check_pin(card, card.space, None)
    assert check_pin(card, f"{name}:2", 2)
    assert not check_pin(card, card.space, 2)
    assert not check_pin(card, "other:4", None)
