"""A registry in memory whose versions the simulated engine serves, and a device's models of it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sutra_tasks.engines.encoder import Encoder
from sutra_tasks.engines.golden import GoldenVectors
from sutra_tasks.engines.simulated_engine import SimulatedEncoder
from sutra_tasks.errors import ModelError
from sutra_tasks.models.loaded import loading
from sutra_tasks.models.loaded.model_cache import ModelCache
from sutra_tasks.settings import Settings

OPTIONS = Settings(
    engine="simulated", model="search", models="extra, other", models_dir="/models", model_memory_mb=10
)
MB = 1_000_000


def engine(reference: str) -> SimulatedEncoder:
    made = SimulatedEncoder(model=reference, width=4)
    made.info = replace(made.info, weight_bytes=4 * MB)
    return made


class Manifest:
    def __init__(self, name: str, version: int) -> None:
        encoder = engine(f"{name}@{version}")
        self.name, self.version = name, version
        self.space, self.bytes = encoder.info.space, encoder.info.weight_bytes
        self.golden = GoldenVectors.of(encoder).to_json()


class Store:
    """Three versions of each of two models; it may be out of reach, and counts how often it is asked."""

    def __init__(self) -> None:
        self.serves: dict[str, int | None] = {"search": 1, "docs": 1}
        self.broken: set[str] = set()
        self.is_away = False
        self.unreadable: set[str] = set()
        self.reads: list[str] = []

    def _read(self, what: str) -> None:
        self.reads.append(what)
        if self.is_away:
            raise ModelError("registry", "cannot be used: Stale file handle")

    def names(self) -> list[str]:
        self._read("names")
        return sorted(self.serves)

    def has(self, name: str) -> bool:
        self._read("has")
        return name in self.serves

    def current(self, name: str) -> int | None:
        self._read("current")
        if name in self.unreadable:
            raise ModelError(name, "is a link")
        return self.serves.get(name)

    def resolve(self, reference: str) -> tuple[str, int]:
        self._read("resolve")
        name, _, version = reference.partition("@")
        found = version or self.serves[name]
        if found is None:
            raise ModelError(name, "none of it serves")
        return name, int(found)

    def verify(self, name: str, version: int) -> Manifest:
        self._read("verify")
        if f"{name}@{version}" in self.broken:
            raise ModelError(f"{name}@{version}", "model.safetensors differs")
        return Manifest(name, version)

    def folder(self, name: str, version: int) -> Path:
        self._read("folder")
        return Path(name) / str(version)

    def by_space(self, name: str, space: str) -> int | None:
        self._read("by_space")
        spaces = {one: engine(f"{name}@{one}").info.space for one in (1, 2, 3)}
        return next((version for version, one in spaces.items() if one == space), None)


class Service:
    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder


def models_of(
    monkeypatch: pytest.MonkeyPatch,
    store: Store | None,
    clock: Callable[[], float],
    options: Settings = OPTIONS,
) -> ModelCache:
    """Return a device's models of which the first one serves."""
    monkeypatch.setattr(loading, "load_engine", lambda _, reference, folder=None: engine(reference))  # noqa: ARG005
    made = ModelCache(options, store, clock=clock)  # type: ignore[arg-type]
    made.start(made.load_default(), Service)  # type: ignore[arg-type]
    return made
