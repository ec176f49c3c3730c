"""The models one device holds: one that serves by default, and others that callers name.

Tasks ask for a model and get it with its service; one that is not there is loaded by the task that asks
first, while the device goes on with the others. The least recently used one leaves when room is needed.
A model that is replaced finishes what was tokenised for it: jobs carry their engine.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from celery.utils.log import get_logger

from sutra_tasks.encoding.encoder import check_pin
from sutra_tasks.encoding.engines import load_engine
from sutra_tasks.encoding.golden import Golden
from sutra_tasks.encoding.models import reference_of
from sutra_tasks.errors import ModelError, SpaceUnavailableError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sutra_tasks.encoding.encoder import Encoder
    from sutra_tasks.encoding.service import EmbeddingService
    from sutra_tasks.models.store import ModelStore
    from sutra_tasks.settings import Settings

__all__ = ["Loaded", "Models", "leaving", "load_version", "warm_up"]

logger = get_logger(__name__)

MB: Final = 1_000_000
WARM_UP_WORDS: Final = 30
WARM_UP_TEXTS: Final = (1, 8, 32)
RESOLVED_S: Final = 0.5
"""Seconds for which a name means the version it meant: the registry may be on a disk far away."""
SUPERSEDED_S: Final = 60.0
"""Seconds a version that serves no more stays for parts of long texts that were begun with it."""


@dataclass(slots=True, eq=False)
class Loaded:
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
    golden: Golden
    warm_up: tuple[int, float]
    used_at: float

    @property
    def encoder(self) -> Encoder:
        """Its engine."""
        return self.service.encoder


def leaving(held: Sequence[tuple[str, int, float]], room_bytes: int) -> list[str]:
    """Return which models leave so that the others take up ``room_bytes`` at most.

    Args:
        held: reference, bytes and time of last use of each that may leave.
        room_bytes: what they may take up together.
    """
    total, gone = sum(size for _, size, _ in held), []
    for reference, size, _ in sorted(held, key=lambda one: one[2]):
        if total <= room_bytes:
            break
        gone.append(reference)
        total -= size
    return gone


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


def load_version(options: Settings, store: ModelStore | None, reference: str) -> Encoder:
    """Load the engine of a model that :func:`~sutra_tasks.encoding.models.reference_of` gave.

    Raises:
        ModelError: it cannot be loaded, or is not what its manifest says.
    """
    if store is None or "@" not in reference:
        return load_engine(options, reference)
    name, version = store.resolve(reference)
    store.verify(name, version)
    encoder = load_engine(options, reference, store.folder(name, version))
    said = store.manifest(name, version).space
    if encoder.card.space != said:
        raise ModelError(reference, f"gives the space {encoder.card.space}; its manifest says {said}")
    return encoder


class Models:
    """See the module's docstring; safe to use from many threads."""

    def __init__(
        self,
        options: Settings,
        store: ModelStore | None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take settings and the registry; :meth:`first` comes next."""
        self._options, self._store, self._clock = options, store, clock
        self._lock = threading.Lock()
        self._held: dict[str, Loaded] = {}
        self._loading: dict[str, Future[Loaded]] = {}
        self._resolved: dict[str, tuple[str, float]] = {}
        self._kept: str | None = None
        self._default: Loaded | None = None

    def first(self) -> Encoder:
        """Load the engine of the default model; it serves after :meth:`begin`.

        Raises:
            ModelError: it cannot be loaded.
        """
        self._first = reference_of(self._options.model, self._options, self._store)
        return self._engine(self._first)

    def begin(self, encoder: Encoder, serve: Callable[[Encoder], EmbeddingService]) -> Loaded:
        """Serve the first model.

        Args:
            encoder: from :meth:`first`; nothing else uses it yet.
            serve: makes a model's service.
        """
        self._serve = serve
        self._default = self._measured(self._first, encoder)
        self._held[self._first] = self._default
        return self._default

    @property
    def default(self) -> Loaded:
        """What serves calls that name no model."""
        assert self._default is not None
        return self._default

    @property
    def names(self) -> tuple[str, ...]:
        """What callers may name without waiting for it to be loaded."""
        with self._lock:
            held = list(self._held)
        bare = {name for name in {one.partition("@")[0] for one in held} if self._is_current(name, held)}
        return tuple(sorted({self._options.model, *held, *bare}))

    def has(self, reference: str) -> bool:
        """Say whether a model is in memory."""
        with self._lock:
            return reference in self._held

    def get(self, model: str | None, space: str | None = None, dimensions: int | None = None) -> Loaded:
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
        if model not in (None, self._options.model, loaded.encoder.card.model):
            loaded = self._named(model or "")
        loaded.used_at = self._clock()
        if space is None or check_pin(loaded.encoder.card, space, dimensions):
            return loaded
        return self._pinned(loaded, space, dimensions)

    def load(self, reference: str) -> Loaded:
        """Return a model that is in memory, loading it aside if it is not.

        Raises:
            ModelError: it cannot be loaded, or does not give the vectors that its manifest says.
        """
        with self._lock:
            if (found := self._held.get(reference)) is not None:
                return found
            future = self._loading.get(reference)
            mine = future is None
            if future is None:
                future = self._loading[reference] = Future()
        if not mine:
            return future.result()
        try:
            loaded = self._load(reference)
        except BaseException as error:
            with self._lock:
                del self._loading[reference]
            future.set_exception(error)
            raise
        with self._lock:
            self._held[reference] = loaded
            del self._loading[reference]
            self._make_room(0, but=reference)
        future.set_result(loaded)
        return loaded

    def keep(self, reference: str | None) -> None:
        """Let no lack of room take this model away, until another is kept."""
        self._kept = reference

    def serve_by_default(self, loaded: Loaded) -> None:
        """Have calls that name no model answered by this one from now on."""
        with self._lock:
            self._default = loaded
            loaded.used_at = self._clock()

    def drop_superseded(self) -> None:
        """Let go of versions that serve no more and nobody asked for lately."""
        now = self._clock()
        with self._lock:
            for reference, loaded in list(self._held.items()):
                name, _, version = reference.partition("@")
                if (
                    version
                    and loaded is not self._default
                    and reference != self._kept
                    and now - loaded.used_at > SUPERSEDED_S
                    and not self._is_current(name, [reference])
                ):
                    del self._held[reference]

    def _named(self, model: str) -> Loaded:
        reference = self._reference(model)
        try:
            return self.load(reference)
        except ModelError:
            # Of a version that cannot be loaded the one before goes on, as the default does.
            older = self._newest_held(model)
            if older is None or reference == model:
                raise
            logger.exception("%s cannot be loaded; %s serves on", reference, older.reference)
            return older

    def _reference(self, model: str) -> str:
        now = self._clock()
        reference, found_at = self._resolved.get(model, ("", -float("inf")))
        if now - found_at >= RESOLVED_S:
            reference = reference_of(model, self._options, self._store)
            self._resolved[model] = reference, now
        return reference

    def _pinned(self, loaded: Loaded, space: str, dimensions: int | None) -> Loaded:
        name = loaded.reference.partition("@")[0]
        for one in self._of(name):
            if check_pin(one.encoder.card, space, dimensions):
                return one
        version = self._store.by_space(name, space) if self._store is not None else None
        if version is not None:
            found = self.load(f"{name}@{version}")
            found.used_at = self._clock()
            if check_pin(found.encoder.card, space, dimensions):
                return found
        raise SpaceUnavailableError(loaded.reference, space, loaded.encoder.card.space)

    def _of(self, name: str) -> list[Loaded]:
        with self._lock:
            return [one for reference, one in self._held.items() if reference.partition("@")[0] == name]

    def _newest_held(self, name: str) -> Loaded | None:
        return max(self._of(name), key=lambda one: one.used_at, default=None)

    def _is_current(self, name: str, references: Sequence[str]) -> bool:
        if self._store is None:
            return False
        version = self._store.current(name) if name in self._store.names() else None
        return version is not None and f"{name}@{version}" in references

    def _engine(self, reference: str) -> Encoder:
        if self._store is not None and "@" in reference:
            manifest = self._store.manifest(*self._store.resolve(reference))
            with self._lock:
                self._make_room(manifest.bytes, but=reference)
        return load_version(self._options, self._store, reference)

    def _load(self, reference: str) -> Loaded:
        loaded = self._measured(reference, self._engine(reference))
        golden = loaded.golden
        reason = golden.disagreement(golden)  # of itself: not a number, say
        if reason is not None:
            raise ModelError(reference, "its vectors are no directions: not a number, infinite or zero")
        if self._store is not None and "@" in reference:
            expected = Golden.from_json(self._store.manifest(*self._store.resolve(reference)).golden)
            if (reason := golden.disagreement(expected)) is not None:
                raise ModelError(reference, reason)
        return loaded

    def _measured(self, reference: str, encoder: Encoder) -> Loaded:
        # On this thread: nobody else has the engine yet, and batches of others go on meanwhile.
        speed = warm_up(encoder)
        return Loaded(reference, self._serve(encoder), Golden.of(encoder), speed, self._clock())

    def _make_room(self, size_bytes: int, *, but: str) -> None:
        """Have models leave until another fits; the default and what is kept stay.

        So do other versions of it, for it is not known yet whether the new one will serve.
        """
        staying = {but, self._kept, None if self._default is None else self._default.reference}
        staying |= {one for one in self._held if one.partition("@")[0] == but.partition("@")[0]}
        sizes = {one: held.encoder.card.weight_bytes for one, held in self._held.items()}
        fixed = sum(size for one, size in sizes.items() if one in staying)
        room = self._options.model_memory_mb * MB - fixed - size_bytes
        free = [
            (one, sizes[one], held.used_at) for one, held in self._held.items() if one not in staying
        ]
        for reference in leaving(free, room):
            logger.info("%s leaves to make room", reference)
            del self._held[reference]
