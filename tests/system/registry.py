"""A registry whose versions the simulated engine serves."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from sutra_tasks.engines.golden import Golden
from sutra_tasks.engines.simulated_engine import SimulatedEncoder
from sutra_tasks.models.registry.manifest import Facts
from sutra_tasks.models.registry.store import ModelStore

WIDTH = 384


def encoder_of(reference: str) -> SimulatedEncoder:
    return SimulatedEncoder(model=reference, width=WIDTH)


def add_version(
    store: ModelStore, name: str, folder: Path, *, changed: Callable[[Golden], Golden] = lambda one: one
) -> int:
    """Add the next version, with golden vectors that are ``changed``; return its number."""
    number = len(store.versions(name)) + 1
    source = folder / f"{name}-{number}"
    source.mkdir(parents=True)
    (source / "weights").write_bytes(b"simulated")
    golden = changed(Golden.of(encoder_of(f"{name}@{number}")))
    facts = Facts(space=golden.space, width=WIDTH, golden=golden.to_json(), metrics={"spearman": 0.93})
    manifest = store.add(name, source, facts)
    assert manifest.version == number
    return number


def of_another(golden: Golden) -> Golden:
    """Return golden vectors that no device will reproduce."""
    return Golden(golden.space, np.roll(golden.vectors, 1, axis=0))


def space_of(reference: str) -> str:
    return encoder_of(reference).card.space
