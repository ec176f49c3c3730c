"""One device follows the registry: what it prepares, what it serves, and what keeps it from neither."""

import os
import sys
import threading
from dataclasses import replace
from typing import Any

import pytest

from sutra_tasks import keys
from sutra_tasks.models.loaded.model_cache import RETRY_S, ModelCache
from sutra_tasks.models.rollout.follower import NICE, Follower, lower_thread_priority
from sutra_tasks.models.rollout.promotion import Promotion
from tests.unit.fake_registry import OPTIONS, Store, models_of


class Server:
    """Stands for the server, of which only the announced promotion is read."""

    def __init__(self) -> None:
        self.announced: Promotion | None = None

    def get(self, key: str) -> str | None:
        assert key == keys.promotion()
        return None if self.announced is None else self.announced.to_json()


class Device:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        self.now = 0.0
        self.store, self.server = Store(), Server()
        settings = replace(OPTIONS, model_memory_mb=100, **options)
        self.models: ModelCache = models_of(monkeypatch, self.store, lambda: self.now, settings)
        self.hastened = 0
        self.follower = Follower(
            self.server,  # type: ignore[arg-type]
            self.models,
            settings,
            swap=self.models.set_default,
            hasten=self.hasten,
            clock=lambda: self.now,
        )

    def hasten(self) -> None:
        self.hastened += 1

    @property
    def says(self) -> tuple[str, str]:
        return self.follower.candidate, self.follower.candidate_state

    @property
    def serves(self) -> str:
        return self.models.default.reference


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


def test_a_device_serves_what_the_registry_says(device: Device) -> None:
    for version in (2, 3, 1):
        device.store.serves["search"] = version
        device.follower.step()
        assert device.serves == f"search@{version}"


def test_a_registry_that_cannot_be_read_changes_nothing(device: Device) -> None:
    device.store.is_away = True
    device.follower.step()
    assert device.serves == "search@1"
    device.store.is_away, device.store.serves["search"] = False, 2
    device.follower.step()
    assert device.serves == "search@2"


def test_a_model_of_which_no_version_serves_is_not_followed(device: Device) -> None:
    device.store.serves["search"] = None
    device.follower.step()
    assert device.serves == "search@1"
    assert device.hastened == 0


def test_a_version_that_cannot_be_loaded_is_tried_again_after_a_while(device: Device) -> None:
    device.store.serves["search"], device.store.broken = 2, {"search@2"}
    for _ in range(3):
        device.follower.step()
    assert device.serves == "search@1"
    assert device.store.reads.count("verify") == 2  # the first one's, and once this one's
    device.store.broken.clear()
    device.now += RETRY_S
    device.follower.step()
    assert device.serves == "search@2"


def test_a_device_prepares_what_is_announced_and_keeps_it(device: Device) -> None:
    device.server.announced = Promotion("p", "search", 2)
    device.follower.step()
    assert device.says == ("p", "ready")
    assert device.models.has("search@2")
    assert device.serves == "search@1"
    device.server.announced = None
    device.follower.step()
    assert device.says == ("", "")


def test_a_version_that_cannot_be_prepared_is_told_with_the_reason(device: Device) -> None:
    device.store.broken.add("search@2")
    device.server.announced = Promotion("p", "search", 2)
    device.follower.step()
    candidate, state = device.says
    assert candidate == "p"
    assert "differs" in state


def test_a_model_that_comes_into_memory_after_the_announcement_is_prepared_then(device: Device) -> None:
    device.server.announced = Promotion("p", "docs", 2)
    device.follower.step()
    assert device.says == ("p", "")
    device.models.get("docs")
    device.follower.step()
    assert device.says == ("p", "ready")
    assert device.models.has("docs@2")


def test_a_device_that_is_pinned_to_a_version_stays_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch, model="search@1")
    device.store.serves["search"] = 2
    device.server.announced = Promotion("p", "search", 3)
    device.follower.step()
    assert device.serves == "search@1"
    assert device.says == ("p", "")
    device.models.get("search")  # now another version, too, is in memory for calls
    device.follower.step()
    assert device.says == ("p", "ready")


@pytest.mark.skipif(sys.platform != "linux", reason="priorities are the whole process's there")
def test_only_the_thread_that_loads_steps_back() -> None:
    found: list[int] = []

    def load() -> None:
        lower_thread_priority()
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    thread = threading.Thread(target=load)
    thread.start()
    thread.join()
    assert found == [max(NICE, os.getpriority(os.PRIO_PROCESS, 0))]
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) < NICE
