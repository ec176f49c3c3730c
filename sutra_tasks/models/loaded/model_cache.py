"""The models in a device's memory: one that serves by default, and others that callers name.

A call asks for a model and gets it with its service. The first call for a model that is not in memory
has it loaded on a thread of its own, while batches of other models go on. Only calls for this model
wait, and they do not wait for ever: its storage may hang. The least recently used models are evicted
when another needs their memory. A batch job keeps a reference to its engine, so it is computed even if
its model is superseded or evicted meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Container
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from celery.utils.log import get_logger

from sutra_tasks.engines.encoder import gives_space
from sutra_tasks.engines.golden import GoldenVectors
from sutra_tasks.errors import ModelError, SpaceUnavailableError
from sutra_tasks.models.loaded.eviction import CachedModel, models_to_evict, superseded_models
from sutra_tasks.models.loaded.freeing import EvictedModels
from sutra_tasks.models.loaded.loading import (
    LoadedModel,
    as_model_error,
    check_golden,
    load_verified,
    told_of,
    verified_manifest,
    warm_up,
)
from sutra_tasks.models.loaded.serving_versions import ServingVersions
from sutra_tasks.models.loaded.single_flight import SingleFlight, StillRunning
from sutra_tasks.models.loaded.waiting_places import WaitingPlaces
from sutra_tasks.models.registry.names import bare_name, split_reference

if TYPE_CHECKING:
    from sutra_tasks.batching.service import EmbeddingService
    from sutra_tasks.engines.encoder import Encoder
    from sutra_tasks.models.registry.manifest import Manifest
    from sutra_tasks.models.registry.model_registry import ModelRegistry
    from sutra_tasks.settings import Settings

__all__ = ["PATIENCE_S", "RETRY_S", "ModelCache"]

logger = get_logger(__name__)

RETRY_S: Final = 30.0
"""Seconds until a model that could not be loaded is tried again."""
PATIENCE_S: Final = 120.0
"""Seconds of loading after which no call waits for a model any more; the loading goes on."""
SLOW_S: Final = 10.0
"""Seconds of loading from which on a device that serves tells of it."""

Result = TypeVar("Result")


class ModelCache:
    """The models in memory; safe to use from many threads.

    Attributes:
        serving: which version of each model serves; the follower refreshes it from the registry.
    """

    def __init__(
        self,
        options: Settings,
        registry: ModelRegistry | None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Create an empty cache; call :meth:`load_default` and :meth:`start` next.

        Args:
            options: the deployment's settings.
            registry: its registry, if it has one.
            clock: gives seconds that only grow.
        """
        self._options, self._registry, self._clock = options, registry, clock
        self.serving = ServingVersions(options, registry)
        self._lock = threading.Lock()
        self._places = WaitingPlaces(options.task_threads)
        self._cached: dict[str, LoadedModel] = {}
        self._loads: SingleFlight[LoadedModel] = SingleFlight(clock=clock)
        self._lookups: SingleFlight[Any] = SingleFlight(clock=clock)
        self._evicted = EvictedModels(clock=clock)
        self._failures: dict[str, tuple[str, float]] = {}  # reference -> reason, and when it failed
        self._protected: str | None = None
        self._default: LoadedModel | None = None
        self._began_at = clock()

    def load_default(self) -> Encoder:
        """Load the engine of the default model; it serves after :meth:`start`.

        Raises:
            ModelError: it cannot be loaded.
        """
        reference = self.serving.resolve(self._options.model)
        self._starting = reference, verified_manifest(self._registry, reference)
        with told_of(reference):
            return load_verified(self._options, self._registry, *self._starting)

    def start(
        self, encoder: Encoder, make_service: Callable[[Encoder], EmbeddingService]
    ) -> LoadedModel:
        """Make the model of :meth:`load_default` the default, and return it.

        Args:
            encoder: returned by :meth:`load_default`; no other thread uses it yet.
            make_service: creates the service of a model.

        Raises:
            ModelError: its vectors are not those of its manifest.
        """
        self._make_service = make_service
        reference, manifest = self._starting
        with told_of(reference):
            loaded = self._check(reference, encoder, manifest)
        self.set_default(loaded)
        return loaded

    @property
    def default(self) -> LoadedModel:
        """The model that serves calls that name none."""
        assert self._default is not None
        return self._default

    @property
    def names(self) -> tuple[str, ...]:
        """The names by which calls find a model in memory."""
        with self._lock:
            cached = list(self._cached)
        bare = (bare_name(one) for one in cached if self.serving.serves(one))
        return tuple(sorted({self._options.model, *cached, *bare}))

    @property
    def loading(self) -> str:
        """A sentence about models that are being loaded; "" if none is, or none takes long."""
        if self._default is None:
            seconds = self._clock() - self._began_at
            return f"{self._options.model} is being loaded, for {seconds:.0f} s now"
        slow = {key: s for key, s in self._loads.running().items() if s > SLOW_S}
        return "; ".join(f"{_is_loading(key, s)}" for key, s in sorted(slow.items()))

    def has(self, model: str) -> bool:
        """Return whether the model that a name refers to is in memory."""
        reference = self.serving.of(model) or model
        with self._lock:
            return reference in self._cached

    def find_by_space(self, space: str) -> LoadedModel | None:
        """Return a model in memory, of any name, whose vectors have exactly this space."""
        with self._lock:
            found = next((one for one in self._cached.values() if one.encoder.info.space == space), None)
        if found is not None:
            found.used_at = self._clock()
        return found

    def get(
        self, model: str | None, space: str | None = None, dimensions: int | None = None
    ) -> LoadedModel:
        """Return the model for a call; load it if it is not in memory.

        Args:
            model: its name; None: the default.
            space: the embedding space that the caller requires.
            dimensions: width to which the call cuts its vectors.

        Raises:
            Crowded: too many calls wait for models already.
            InvalidOptionError: callers may not name this model.
            ModelError: it cannot be loaded, or its storage does not answer.
            SpaceUnavailableError: no version of it gives vectors of that space.
        """
        loaded = self.default
        if model not in (None, self._options.model, loaded.encoder.info.model):
            loaded = self._named(model or "")
        loaded.used_at = self._clock()
        if space is None or gives_space(loaded.encoder.info, space, dimensions):
            return loaded
        return self._version_of_space(loaded, space, dimensions)

    def load(self, reference: str, *, patience_s: float | None = None) -> LoadedModel:
        """Return a model; load it if it is not in memory, without changing the default.

        Args:
            reference: the model.
            patience_s: seconds of loading after which this thread waits no longer; None: any number.

        Raises:
            ModelError: it cannot be loaded, its vectors are not those of its manifest, or it does not
                fit into ``SUTRA_MODEL_MEMORY_MB`` beside the models that must stay.
        """
        with self._lock:
            if (found := self._cached.get(reference)) is not None:
                return found
        try:
            return self._loads.do(reference, lambda: self._load(reference), patience_s)
        except StillRunning as error:
            raise ModelError(reference, _is_loading("it", error.seconds)) from None

    def protect(self, reference: str | None) -> None:
        """Never evict this model, until another one is protected."""
        self._protected = reference

    def set_default(self, loaded: LoadedModel) -> None:
        """Make a model the one that serves calls that name none."""
        with self._lock:
            self._cached[loaded.reference] = self._default = loaded
            loaded.used_at = self._clock()

    def evict_superseded(self) -> None:
        """Evict versions that no longer serve and were not used lately, and free evicted memory."""
        with self._lock:
            staying = {one for one in self._cached if self.serving.serves(one)}
            entries = self._entries(staying | {self.default.reference})
            versions = [one for one in entries if split_reference(one.reference) is not None]
            for reference in superseded_models(versions, self._clock()):
                self._evict(reference)
        self._evicted.free()

    def _named(self, model: str) -> LoadedModel:
        reference = self.serving.of(model) or model
        with self._lock:
            found = self._cached.get(reference)
        if found is not None:
            return found
        if reference == model:  # only the registry's folder can say which version is meant
            reference = self._looked_up(model, lambda: self.serving.resolve(model))
        try:
            return self._load_for_call(reference)
        except ModelError:
            # The default behaves alike: where a new version cannot be loaded, the old one serves on.
            older = self._last_used_version(model)
            if older is None or reference == model:
                raise
            return older

    def _load_for_call(self, reference: str) -> LoadedModel:
        """Load a model, unless loading it failed a moment ago."""
        reason, failed_at = self._failures.get(reference, ("", -float("inf")))
        if self._clock() - failed_at < RETRY_S:
            raise ModelError(reference, reason)
        with self._places.place(bare_name(reference)):
            return self.load(reference, patience_s=PATIENCE_S)

    def _looked_up(self, model: str, look: Callable[[], Result]) -> Result:
        """Return what the registry says of a model, which is read apart, as it may be on a network."""
        with self._places.place(bare_name(model)):
            try:
                found: Result = self._lookups.do(model, look, PATIENCE_S)
            except StillRunning as error:
                reason = (
                    f"the registry does not answer for {error.seconds:.0f} s: does its storage hang?"
                )
                raise ModelError(model, reason) from None
        return found

    def _version_of_space(self, loaded: LoadedModel, space: str, dimensions: int | None) -> LoadedModel:
        """Return the version of the same model that gives a space; load it if it is not in memory."""
        name = bare_name(loaded.reference)
        fitting = (
            one for one in self._versions(name) if gives_space(one.encoder.info, space, dimensions)
        )
        found = next(fitting, None)
        if found is None and self._registry is not None and name != loaded.reference:
            by_space = partial(self._registry.by_space, name, space)
            version = self._looked_up(f"{name} of the space {space}", by_space)
            found = None if version is None else self._load_for_call(f"{name}@{version}")
        if found is None or not gives_space(found.encoder.info, space, dimensions):
            raise SpaceUnavailableError(loaded.reference, space, loaded.encoder.info.space)
        found.used_at = self._clock()
        return found

    def _versions(self, name: str) -> list[LoadedModel]:
        with self._lock:
            return [one for reference, one in self._cached.items() if bare_name(reference) == name]

    def _last_used_version(self, name: str) -> LoadedModel | None:
        return max(self._versions(name), key=lambda one: one.used_at, default=None)

    def _load(self, reference: str) -> LoadedModel:
        with self._lock:
            if (found := self._cached.get(reference)) is not None:
                return found  # another thread loaded it just before
        try:
            loaded = self._load_checked(reference)
            with self._lock:
                self._make_space(reference, loaded.encoder.info.weight_bytes)
                self._cached[reference] = loaded
                self._failures.pop(reference, None)
        except Exception as error:
            told = as_model_error(reference, error)
            # Only the reason: the error's traceback refers to the parts of the model that were loaded.
            self._failures[reference] = told.reason, self._clock()
            self._evicted.note_failed_load()
            logger.exception("%s cannot be loaded", reference)  # once, however many calls wait for it
            if told is error:
                raise
            raise told from error
        self._evicted.free()
        return loaded

    def _load_checked(self, reference: str) -> LoadedModel:
        manifest = verified_manifest(self._registry, reference)
        if manifest is not None:
            # The version before is kept until this one is loaded: it serves on if this one fails.
            before = self._last_used_version(manifest.name)
            with self._lock:
                self._make_space(reference, manifest.bytes, uncounted=before)
            self._evicted.free()
        encoder = load_verified(self._options, self._registry, reference, manifest)
        return self._check(reference, encoder, manifest)

    def _check(self, reference: str, encoder: Encoder, manifest: Manifest | None) -> LoadedModel:
        # On this thread: no other thread has the engine yet, and batches of other models go on.
        speed, golden = warm_up(encoder), GoldenVectors.of(encoder)
        check_golden(reference, golden, manifest)
        return LoadedModel(reference, self._make_service(encoder), golden, speed, self._clock())

    def _make_space(
        self, reference: str, size_bytes: int, *, uncounted: LoadedModel | None = None
    ) -> None:
        """Evict models until another one fits; the caller holds the lock.

        The default stays, and so does the version of the same model that serves.
        """
        name = bare_name(reference)
        serving = self.serving.of(name)
        staying = {self.default.reference, serving}
        entries = [
            one
            for one in self._entries(staying)
            if one.reference != reference
            and (uncounted is None or one.reference != uncounted.reference or one.stays)
        ]
        becomes_default = reference == serving and name == self._options.model
        for one in models_to_evict(
            reference,
            size_bytes,
            entries,
            self._options.model_memory_mb,
            may_exceed_limit=becomes_default or reference == self._protected,
        ):
            logger.info("%s is evicted to make space", one)
            self._evict(one)

    def _entries(self, staying: Container[str | None]) -> list[CachedModel]:
        return [
            CachedModel(
                reference,
                one.encoder.info.weight_bytes,
                one.used_at,
                stays=reference in staying,
                is_candidate=reference == self._protected,
            )
            for reference, one in self._cached.items()
        ]

    def _evict(self, reference: str) -> None:
        self._evicted.add(self._cached.pop(reference).encoder)


def _is_loading(what: str, seconds: float) -> str:
    return f"{what} is being loaded, for {seconds:.0f} s now: is it large, or does its storage hang?"
