"""A registry whose versions the simulated engine serves."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from sutra_tasks.engines.golden import GoldenVectors
from sutra_tasks.engines.simulated_engine import SimulatedEncoder
from sutra_tasks.models.registry.manifest import VersionFacts
from sutra_tasks.models.registry.model_registry import ModelRegistry

WIDTH = 384


def encoder_of(reference: str) -> SimulatedEncoder:
    return SimulatedEncoder(model=reference, width=WIDTH)


def add_version(
    store: ModelRegistry,
    name: str,
    folder: Path,
    *,
    changed: Callable[[GoldenVectors], GoldenVectors] = lambda one: one,
) -> int:
    """Add the next version, with golden vectors as ``changed`` returns them; return its number."""
    number = len(store.versions(name)) + 1
    source = folder / f"{name}-{number}"
    source.mkdir(parents=True)
    (source / "weights").write_bytes(b"simulated")
    golden = changed(GoldenVectors.of(encoder_of(f"{name}@{number}")))
    facts = VersionFacts(
        space=golden.space, width=WIDTH, golden=golden.to_json(), metrics={"spearman": 0.93}
    )
    manifest = store.add(name, source, facts)
    assert manifest.version == number
    return number


def unreproducible(golden: GoldenVectors) -> GoldenVectors:
    """Return golden vectors that no device reproduces."""
    return GoldenVectors(golden.space, np.roll(golden.vectors, 1, axis=0))


def space_of(reference: str) -> str:
    return encoder_of(reference).info.space
