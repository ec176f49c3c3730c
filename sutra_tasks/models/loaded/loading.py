"""How a model comes into memory: held against its manifest, files and vectors, and warmed up."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sutra_tasks.engines.golden import GoldenVectors
from sutra_tasks.engines.load import load_engine
from sutra_tasks.errors import ModelError
from sutra_tasks.models.registry.names import split_reference

if TYPE_CHECKING:
    from sutra_tasks.batching.service import EmbeddingService
    from sutra_tasks.engines.encoder import Encoder
    from sutra_tasks.models.registry.manifest import Manifest
    from sutra_tasks.models.registry.model_registry import ModelRegistry
    from sutra_tasks.settings import Settings

__all__ = [
    "LoadedModel",
    "as_model_error",
    "check_golden",
    "load_verified",
    "load_version",
    "verified_manifest",
    "warm_up",
]

WARM_UP_WORDS: Final = 30
WARM_UP_TEXTS: Final = (1, 8, 32)


@dataclass(slots=True, eq=False)
class LoadedModel:
    """A model in memory.

    Attributes:
        reference: its name; of the registry with its version, ``name@3``.
        service: what answers calls with it.
        golden: its vectors of the golden texts.
        warm_up: tokens and seconds of the last pass when it was loaded.
        used_at: when it was last asked for, by the monotonic clock.
    """

    reference: str
    service: EmbeddingService
    golden: GoldenVectors
    warm_up: tuple[int, float]
    used_at: float

    @property
    def encoder(self) -> Encoder:
        """Its engine."""
        return self.service.encoder


def verified_manifest(store: ModelRegistry | None, reference: str) -> Manifest | None:
    """Return the manifest of a version whose files it describes; None of a model not of the registry.

    Raises:
        ModelError: there is no such version, or a file is not that of its manifest.
    """
    found = split_reference(reference)
    return None if store is None or found is None else store.verify(*found)


def load_verified(
    options: Settings, store: ModelRegistry | None, reference: str, manifest: Manifest | None
) -> Encoder:
    """Load the engine of a model whose manifest :func:`verified_manifest` gave.

    Raises:
        ModelError: it cannot be loaded, or gives another space than its manifest says.
    """
    if store is None or manifest is None:
        return load_engine(options, reference)
    encoder = load_engine(options, reference, store.folder(manifest.name, manifest.version))
    if encoder.info.space != manifest.space:
        raise ModelError(
            reference, f"gives the space {encoder.info.space}; its manifest says {manifest.space}"
        )
    return encoder


def load_version(options: Settings, store: ModelRegistry | None, reference: str) -> Encoder:
    """Load the engine of a model by the reference that ``resolve_model_name`` returned.

    Raises:
        ModelError: it cannot be loaded, or is not what its manifest says.
    """
    return load_verified(options, store, reference, verified_manifest(store, reference))


def check_golden(reference: str, golden: GoldenVectors, manifest: Manifest | None) -> None:
    """Hold a model's vectors of the golden texts against its manifest; None promises nothing.

    Raises:
        ModelError: they are others.
    """
    if manifest is None:
        return
    reason = golden.disagreement(GoldenVectors.from_json(manifest.golden))
    if reason is not None:
        raise ModelError(reference, reason)


def warm_up(encoder: Encoder) -> tuple[int, float]:
    """Run a model on a few shapes: the first passes allocate, and on GPUs compile.

    Returns:
        Tokens and seconds of the last pass, the first measurement of its speed.
    """
    tokens, seconds = 0, 0.0
    for texts in WARM_UP_TEXTS:
        batch = encoder.tokenize(["word " * WARM_UP_WORDS] * texts, None)
        began = time.perf_counter()
        encoder.encode(batch)
        tokens, seconds = sum(one.tokens for one in batch), time.perf_counter() - began
    return tokens, seconds


def as_model_error(reference: str, error: Exception) -> ModelError:
    """Return what went wrong with a model as a ModelError, whatever its engine raised."""
    if isinstance(error, ModelError):
        return error
    first_line = next(iter(str(error).splitlines()), "")
    return ModelError(reference, f"cannot be loaded: {type(error).__name__}: {first_line}")
