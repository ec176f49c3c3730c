"""The models one device holds: one that serves by default, and others that callers name.

Tasks ask for a model and get it with its service; one that is not there is loaded by the task that asks
first, while the device goes on with the others. The least recently used one leaves when room is needed.
A model that is replaced finishes what was tokenised for it: jobs carry their engine.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from celery.utils.log import get_logger

from sutra_tasks.engines.encoder import gives_space
from sutra_tasks.engines.golden import GoldenVectors
from sutra_tasks.errors import ModelError, SpaceUnavailableError
from sutra_tasks.models.loaded.eviction import CachedModel, models_to_evict
from sutra_tasks.models.loaded.freeing import EvictedModels
from sutra_tasks.models.loaded.loading import (
    LoadedModel,
    as_model_error,
    check_golden,
    load_verified,
    load_version,
    verified_manifest,
    warm_up,
)
from sutra_tasks.models.loaded.serving_versions import ServingVersions
from sutra_tasks.models.loaded.single_flight import SingleFlight
from sutra_tasks.models.registry.names import bare_name, split_reference

if TYPE_CHECKING:
    from sutra_tasks.batching.service import EmbeddingService
    from sutra_tasks.engines.encoder import Encoder
    from sutra_tasks.models.registry.manifest import Manifest
    from sutra_tasks.models.registry.model_registry import ModelRegistry
    from sutra_tasks.settings import Settings

__all__ = ["RETRY_S", "LoadedModel", "ModelCache", "load_version"]

logger = get_logger(__name__)

RETRY_S: Final = 30.0
"""Seconds after which a model that could not be loaded is tried once more."""
SUPERSEDED_S: Final = 60.0
"""Seconds a version that serves no more stays for parts of long texts that were begun with it."""


class ModelCache:
    """See the module's docstring; safe to use from many threads.

    Attributes:
        catalogue: which versions serve; whoever follows the registry refreshes it.
    """

    def __init__(
        self,
        options: Settings,
        store: ModelRegistry | None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take settings and the registry; :meth:`first` comes next."""
        self._options, self._store, self._clock = options, store, clock
        self.serving = ServingVersions(options, store)
        self._departed = EvictedModels(clock=clock)
        self._lock = threading.Lock()
        self._held: dict[str, LoadedModel] = {}
        self._loads: SingleFlight[LoadedModel] = SingleFlight()
        self._failed: dict[str, tuple[str, float]] = {}
        self._kept: str | None = None
        self._default: LoadedModel | None = None

    def first(self) -> Encoder:
        """Load the engine of the default model; it serves after :meth:`begin`.

        Raises:
            ModelError: it cannot be loaded.
        """
        reference = self.serving.resolve(self._options.model)
        self._first = reference, verified_manifest(self._store, reference)
        return load_verified(self._options, self._store, *self._first)

    def begin(self, encoder: Encoder, serve: Callable[[Encoder], EmbeddingService]) -> LoadedModel:
        """Serve the first model.

        Args:
            encoder: from :meth:`first`; nothing else uses it yet.
            serve: makes a model's service.

        Raises:
            ModelError: it does not give the vectors that its manifest says.
        """
        self._serve = serve
        reference, manifest = self._first
        loaded = self._measured(reference, encoder, manifest)
        self.serve_by_default(loaded)
        return loaded

    @property
    def default(self) -> LoadedModel:
        """What serves calls that name no model."""
        assert self._default is not None
        return self._default

    @property
    def names(self) -> tuple[str, ...]:
        """What callers may name without waiting for it to be loaded."""
        with self._lock:
            held = list(self._held)
        bare = (bare_name(one) for one in held if self.serving.serves(one))
        return tuple(sorted({self._options.model, *held, *bare}))

    def has(self, model: str) -> bool:
        """Say whether what a name means is in memory."""
        reference = self.serving.of(model) or model
        with self._lock:
            return reference in self._held

    def of_space(self, space: str) -> LoadedModel | None:
        """Return a model in memory, by whatever name, that gives vectors of exactly this space."""
        with self._lock:
            found = next((one for one in self._held.values() if one.encoder.info.space == space), None)
        if found is not None:
            found.used_at = self._clock()
        return found

    def get(
        self, model: str | None, space: str | None = None, dimensions: int | None = None
    ) -> LoadedModel:
        """Return the model for a call, loading it if need be.

        Args:
            model: its name; None: the default.
            space: the embedding space the caller pins.
            dimensions: width to which the call cuts its vectors.

        Raises:
            InvalidOptionError: no such model may be named.
            ModelError: it cannot be loaded.
            SpaceUnavailableError: it does not give vectors of that space.
        """
        loaded = self.default
        if model not in (None, self._options.model, loaded.encoder.info.model):
            loaded = self._named(model or "")
        loaded.used_at = self._clock()
        if space is None or gives_space(loaded.encoder.info, space, dimensions):
            return loaded
        return self._pinned(loaded, space, dimensions)

    def load(self, reference: str) -> LoadedModel:
        """Return a model that is in memory, loading it aside if it is not.

        Raises:
            ModelError: it cannot be loaded, does not give the vectors that its manifest says, or does
                not fit into ``SUTRA_MODEL_MEMORY_MB`` beside those that must stay.
        """
        with self._lock:
            if (found := self._held.get(reference)) is not None:
                return found
        return self._loads.do(reference, lambda: self._load(reference))

    def keep(self, reference: str | None) -> None:
        """Let no lack of room take this model away, until another is kept."""
        self._kept = reference

    def serve_by_default(self, loaded: LoadedModel) -> None:
        """Have calls that name no model answered by this one from now on."""
        with self._lock:
            self._held[loaded.reference] = self._default = loaded
            loaded.used_at = self._clock()

    def drop_superseded(self) -> None:
        """Let go of versions that serve no more and nobody asked for lately, and of their memory."""
        now = self._clock()
        with self._lock:
            for reference, loaded in list(self._held.items()):
                if (
                    split_reference(reference) is not None
                    and loaded is not self._default
                    and reference != self._kept
                    and now - loaded.used_at > SUPERSEDED_S
                    and not self.serving.serves(reference)
                ):
                    self._drop(reference)
        self._departed.collect()

    def _named(self, model: str) -> LoadedModel:
        reference = self.serving.of(model) or model
        with self._lock:
            found = self._held.get(reference)
        if found is not None:
            return found
        if reference == model:  # not known without the disk
            reference = self.serving.resolve(model)
        try:
            return self._asked(reference)
        except ModelError:
            # Of a version that cannot be loaded the one before goes on, as the default does.
            older = self._newest_held(model)
            if older is None or reference == model:
                raise
            return older

    def _asked(self, reference: str) -> LoadedModel:
        """Load a model for a call, unless that failed a moment ago."""
        reason, at = self._failed.get(reference, ("", -float("inf")))
        if self._clock() - at < RETRY_S:
            raise ModelError(reference, reason)
        try:
            return self.load(reference)
        except ModelError:
            logger.exception("%s cannot be loaded", reference)
            raise

    def _pinned(self, loaded: LoadedModel, space: str, dimensions: int | None) -> LoadedModel:
        name = bare_name(loaded.reference)
        found = next(
            (one for one in self._of(name) if gives_space(one.encoder.info, space, dimensions)), None
        )
        if found is None and self._store is not None and split_reference(loaded.reference) is not None:
            version = self._store.by_space(name, space)
            found = None if version is None else self._asked(f"{name}@{version}")
        if found is None or not gives_space(found.encoder.info, space, dimensions):
            raise SpaceUnavailableError(loaded.reference, space, loaded.encoder.info.space)
        found.used_at = self._clock()
        return found

    def _of(self, name: str) -> list[LoadedModel]:
        with self._lock:
            return [one for reference, one in self._held.items() if bare_name(reference) == name]

    def _newest_held(self, name: str) -> LoadedModel | None:
        return max(self._of(name), key=lambda one: one.used_at, default=None)

    def _load(self, reference: str) -> LoadedModel:
        with self._lock:
            if (found := self._held.get(reference)) is not None:
                return found  # another thread was quicker
        try:
            loaded = self._verified(reference)
            with self._lock:
                self._make_room(reference, loaded.encoder.info.weight_bytes)
                self._held[reference] = loaded
                self._failed.pop(reference, None)
        except Exception as error:
            told = as_model_error(reference, error)
            # Its words only: the error itself refers to what was loaded of the model.
            self._failed[reference] = told.reason, self._clock()
            self._departed.note_failure()
            if told is error:
                raise
            raise told from error
        self._departed.collect()
        return loaded

    def _verified(self, reference: str) -> LoadedModel:
        manifest = verified_manifest(self._store, reference)
        if manifest is not None:
            # The one before serves on if this one fails.
            before = self._newest_held(manifest.name)
            with self._lock:
                self._make_room(reference, manifest.bytes, sparing=before)
            self._departed.collect()
        encoder = load_verified(self._options, self._store, reference, manifest)
        loaded = self._measured(reference, encoder, manifest)
        if loaded.golden.disagreement(loaded.golden) is not None:  # of itself: not a number, say
            raise ModelError(reference, "its vectors are no directions: not a number, infinite or zero")
        return loaded

    def _measured(self, reference: str, encoder: Encoder, manifest: Manifest | None) -> LoadedModel:
        # On this thread: nobody else has the engine yet, and batches of others go on meanwhile.
        speed, golden = warm_up(encoder), GoldenVectors.of(encoder)
        check_golden(reference, golden, manifest)
        return LoadedModel(reference, self._serve(encoder), golden, speed, self._clock())

    def _make_room(self, reference: str, size_bytes: int, *, sparing: LoadedModel | None = None) -> None:
        """Have models leave until another fits; under the lock.

        The default stays, and of the model itself the version that serves.
        """
        serving = self.serving.of(bare_name(reference))
        staying = {self.default.reference, serving}
        becomes_default = reference == serving and bare_name(reference) == self._options.model
        held = [
            CachedModel(
                name, one.encoder.info.weight_bytes, one.used_at, name in staying, name == self._kept
            )
            for name, one in self._held.items()
            if name != reference and (one is not sparing or name in staying)
        ]
        at_any_price = becomes_default or reference == self._kept
        for name in models_to_evict(
            reference, size_bytes, held, self._options.model_memory_mb, at_any_price=at_any_price
        ):
            logger.info("%s leaves to make room", name)
            self._drop(name)

    def _drop(self, reference: str) -> None:
        self._departed.add(self._held.pop(reference).encoder)
