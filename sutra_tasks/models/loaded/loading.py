"""Loads a model, checks its files and vectors against its manifest, and warms it up."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sutra_tasks.engines.encoder import cut_to_window
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
    "told_of",
    "verified_manifest",
    "warm_up",
]

WARM_UP_WORDS: Final = 30
WARM_UP_TEXTS: Final = (1, 8, 32)


@dataclass(slots=True, eq=False)
class LoadedModel:
    """A model in memory.

    Attributes:
        reference: its name; ``name@3`` for a version of the registry.
        service: answers calls with it.
        golden: its vectors of the golden texts.
        warm_up: tokens and seconds of the last batch of its warm-up.
        used_at: when a call last asked for it, in seconds of the monotonic clock.
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


def verified_manifest(registry: ModelRegistry | None, reference: str) -> Manifest | None:
    """Return the manifest of a version whose files fit it; None for a model outside the registry.

    Raises:
        ModelError: there is no such version, or a file differs from its manifest.
    """
    found = split_reference(reference)
    return None if registry is None or found is None else registry.verify(*found)


def load_verified(
    options: Settings, registry: ModelRegistry | None, reference: str, manifest: Manifest | None
) -> Encoder:
    """Load the engine of a model.

    Args:
        options: the deployment's settings.
        registry: its registry, if it has one.
        reference: the model.
        manifest: returned by :func:`verified_manifest`.

    Raises:
        ModelError: it cannot be loaded, or its embedding space differs from its manifest.
    """
    if registry is None or manifest is None:
        return load_engine(options, reference)
    encoder = load_engine(options, reference, registry.folder(manifest.name, manifest.version))
    if encoder.info.space != manifest.space:
        raise ModelError(
            reference, f"gives the space {encoder.info.space}; its manifest says {manifest.space}"
        )
    return encoder


def load_version(options: Settings, registry: ModelRegistry | None, reference: str) -> Encoder:
    """Verify the files of a model and load its engine.

    Raises:
        ModelError: it cannot be loaded, or differs from its manifest.
    """
    return load_verified(options, registry, reference, verified_manifest(registry, reference))


def check_golden(reference: str, golden: GoldenVectors, manifest: Manifest | None) -> None:
    """Compare a model's golden vectors with those of its manifest, if it has one.

    Raises:
        ModelError: they differ, or a model with these vectors cannot serve.
    """
    if (fault := golden.fault()) is not None:
        raise ModelError(reference, fault)
    if manifest is None:
        return
    reason = golden.disagreement(GoldenVectors.from_json(manifest.golden))
    if reason is not None:
        raise ModelError(reference, reason)


def warm_up(encoder: Encoder) -> tuple[int, float]:
    """Compute batches of a few shapes: first batches allocate memory, and compile on GPUs.

    Returns:
        Tokens and seconds of the last batch, the first measurement of the model's speed.
    """
    tokens, seconds = 0, 0.0
    for texts in WARM_UP_TEXTS:
        whole = encoder.tokenize(["word " * WARM_UP_WORDS] * texts, None)
        batch = [cut_to_window(encoder, one) for one in whole]
        began = time.perf_counter()
        encoder.encode(batch)
        tokens, seconds = sum(one.tokens for one in batch), time.perf_counter() - began
    return tokens, seconds


def as_model_error(reference: str, error: Exception) -> ModelError:
    """Return any error of an engine as a ModelError about the model."""
    if isinstance(error, ModelError):
        return error
    first_line = next(iter(str(error).splitlines()), "")
    return ModelError(reference, f"cannot be loaded: {type(error).__name__}: {first_line}")


@contextmanager
def told_of(reference: str) -> Iterator[None]:
    """Raise any error of an engine inside the block as a ModelError about the model."""
    try:
        yield
    except Exception as error:
        told = as_model_error(reference, error)
        if told is error:
            raise
        raise told from error
