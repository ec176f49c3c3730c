"""Several models in one fleet, and versions that change while it works."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis

from sutra_tasks import embed, keys
from sutra_tasks.engines.simulated_engine import vectors_of
from sutra_tasks.errors import (
    InvalidOptionError,
    ModelError,
    PromotionRefusedError,
    SpaceUnavailableError,
)
from sutra_tasks.membership.fleet import fleet_members
from sutra_tasks.models.registry.model_registry import ModelRegistry
from sutra_tasks.models.rollout.gate import Thresholds
from sutra_tasks.models.rollout.promotion import promote, wait_until_served
from tests.system.registry import WIDTH, add_version, space_of, unreproducible

Fleet = Callable[..., Any]


@pytest.fixture
def store(tmp_path: Path) -> ModelRegistry:
    """Give a registry in which search@1 serves and search@2 is there."""
    (tmp_path / "models").mkdir()
    made = ModelRegistry(tmp_path / "models")
    for _ in range(2):
        add_version(made, "search", tmp_path / "sources")
    made.promote("search", 1)
    return made


@pytest.fixture
def serving(start_fleet: Fleet, store: ModelRegistry, tmp_path: Path) -> Fleet:
    """Return a fleet that follows the model ``search`` of the registry."""

    def start(devices: int = 2, **options: Any) -> Any:
        chosen = {"model": "search", "models_dir": str(tmp_path / "models"), "models": "extra"}
        return start_fleet(devices, **(chosen | options))

    return start


def vector_of(text: str, reference: str) -> Any:
    return vectors_of([reference + text], WIDTH)[0]


def asked(text: str, **options: Any) -> Any:
    return embed.delay(text, details=True, **options).get(timeout=20)


def test_each_call_gets_the_model_it_names(serving: Fleet) -> None:
    with serving():
        for model, reference in (
            (None, "search@1"), ("search", "search@1"), ("search@2", "search@2"), ("extra", "extra"),
        ):  # fmt: skip
            found = asked("a text", model=model)
            assert (found.model, found.space) == (reference, space_of(reference))
            assert np.allclose(found.vectors, vector_of("a text", reference), atol=1e-6)
        for name in ("other", "/etc/passwd", "../search"):
            with pytest.raises(InvalidOptionError, match="one of"):
                asked("a text", model=name)
        with pytest.raises(ModelError, match="versions 1, 2"):
            asked("a text", model="search@9")


def test_a_promotion_changes_all_devices_and_fails_nobody(
    serving: Fleet, store: ModelRegistry, client: redis.Redis
) -> None:
    with serving(2) as fleet:
        stop = threading.Event()
        spaces: list[str] = []
        errors: list[Exception] = []

        def ask() -> None:
            while not stop.is_set():
                try:
                    spaces.extend(one.space for one in [asked("a text") for _ in range(5)])
                except Exception as error:  # noqa: BLE001 - told below
                    errors.append(error)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        devices = promote(
            client, store, "search", 2, thresholds=Thresholds(spearman=0.9), options=fleet.options
        )
        stop.set()
        for thread in threads:
            thread.join(30)
        assert len(devices) == 2
        assert {one.record.model for one in fleet_members(client) if one.record} == {"search@2"}
        assert errors == []
        assert set(spaces) <= {space_of("search@1"), space_of("search@2")}
        assert {asked("a text").space for _ in range(10)} == {space_of("search@2")}

        old = asked("a text", space=space_of("search@1"))
        assert (old.model, old.space) == ("search@1", space_of("search@1"))
        with pytest.raises(SpaceUnavailableError):
            asked("a text", space="nobodys:384")

        assert store.rollback("search") == 1
        wait_until_served(client, store, "search", fleet.options)
        assert {asked("a text").space for _ in range(10)} == {space_of("search@1")}


def test_a_version_that_devices_refuse_leaves_the_old_one_serving(
    serving: Fleet, store: ModelRegistry, client: redis.Redis, tmp_path: Path
) -> None:
    bad = add_version(store, "search", tmp_path / "sources", changed=unreproducible)
    with serving(2) as fleet:
        with pytest.raises(PromotionRefusedError, match="vectors differ"):
            promote(client, store, "search", bad, thresholds=Thresholds(), options=fleet.options)
        with pytest.raises(PromotionRefusedError, match=r"under the 0\.99"):
            promote(
                client, store, "search", 2, thresholds=Thresholds(spearman=0.99), options=fleet.options
            )
        assert store.current("search") == 1
        assert {asked("a text").space for _ in range(5)} == {space_of("search@1")}


def test_a_registry_that_points_to_what_cannot_be_loaded_leaves_the_old_one_serving(
    serving: Fleet, store: ModelRegistry, tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    bad = add_version(store, "search", tmp_path / "sources", changed=unreproducible)
    with serving(1) as fleet:
        store.promote("search", bad)
        wait_until(lambda: "search@1 serves on" in fleet.log.read_text())
        assert asked("a text").space == space_of("search@1")


def test_while_the_registry_is_away_what_is_in_memory_serves(
    serving: Fleet,
    store: ModelRegistry,
    client: redis.Redis,
    tmp_path: Path,
    wait_until: Callable[..., None],
) -> None:
    with serving(1) as fleet:
        assert asked("a text", model="search@2").model == "search@2"
        (tmp_path / "models").rename(tmp_path / "away")
        wait_until(lambda: "which version serves cannot be read" in fleet.log.read_text())
        (seen,) = fleet_members(client)
        assert seen.record is not None
        started, beats = (
            seen.record.incarnation,
            int(client.hget(keys.leases(), seen.record.incarnation) or 0),
        )
        wait_until(lambda: int(client.hget(keys.leases(), started) or 0) > beats + 1)
        for model, reference in ((None, "search@1"), ("search", "search@1"), ("search@2", "search@2")):
            assert asked("a text", model=model).model == reference
        (tmp_path / "away").rename(tmp_path / "models")
        assert promote(client, store, "search", 2, thresholds=Thresholds(), options=fleet.options) == [
            seen.record.id
        ]


def test_a_device_that_is_pinned_to_a_version_stays_with_it_and_holds_up_nobody(
    serving: Fleet, store: ModelRegistry, client: redis.Redis
) -> None:
    with serving(1, model="search@1") as fleet:
        assert promote(client, store, "search", 2, thresholds=Thresholds(), options=fleet.options) == []
        assert asked("a text").model == "search@1"
        assert asked("a text", model="search").model == "search@2"
