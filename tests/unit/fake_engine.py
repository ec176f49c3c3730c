"""An engine whose failures are chosen, and batchers that run on it."""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from threading import Event

import numpy as np

from sutra_tasks.batching.batcher import Batcher
from sutra_tasks.batching.jobs import NO_CONTEXT, Encoded, Encodes, JobContext
from sutra_tasks.batching.next_batch import Limits
from sutra_tasks.engines.encoder import ModelInfo, TokenizedText
from sutra_tasks.vectors import Floats

LIMITS = Limits(max_tokens=1000, max_texts=8, max_wait_s=0)
ONE_BY_ONE = Limits(max_tokens=1000, max_texts=1, max_wait_s=0)
WITHIN_S = 10


class FakeEncoder:
    """Text n becomes the row [n, n]; a closed gate holds it up.

    ``bad`` texts fail it, ``odd`` ones become NaN, and more padded tokens than ``memory`` do not fit.
    """

    def __init__(
        self,
        *,
        bad: Collection[int] = (),
        odd: Collection[int] = (),
        memory: float = math.inf,
        before: Callable[[], None] = lambda: None,
    ):
        self.info = ModelInfo(model="fake", space="fake:2", width=2, window=512, prompts={})
        self.batches: list[list[int]] = []
        self.began, self.gate = Event(), Event()
        self.gate.set()
        self.memory = memory
        self._bad, self._odd, self._before = bad, odd, before

    def encode(self, batch: Sequence[TokenizedText]) -> Floats:
        numbers = [text.content for text in batch]
        self.batches.append(numbers)
        self.began.set()
        assert self.gate.wait(WITHIN_S)
        self._before()
        if len(batch) * max(text.tokens for text in batch) > self.memory:
            raise MemoryError(numbers)
        if any(n in self._bad for n in numbers):
            raise ValueError(numbers)
        return np.array([[math.nan if n in self._odd else n, n] for n in numbers], dtype=np.float32)


def texts(*numbers: int, tokens: int = 5) -> list[TokenizedText]:
    return [TokenizedText(tokens, content=n) for n in numbers]


def numbers_of(future: Future[Encoded]) -> list[float]:
    rows = future.result(WITHIN_S).rows
    assert rows[:, 0].tolist() == rows[:, 1].tolist()
    found: list[float] = rows[:, 0].tolist()
    return found


class OfOneModel(Batcher):
    """A batcher whose jobs are one engine's where a test names no other."""

    def __init__(self, encoder: FakeEncoder, limits: Limits = LIMITS, **options: object) -> None:
        super().__init__(limits, **options)  # type: ignore[arg-type]
        self.encoder = encoder

    def submit(
        self,
        texts: Sequence[TokenizedText],
        *,
        encoder: Encodes | None = None,
        context: JobContext = NO_CONTEXT,
    ) -> Future[Encoded]:
        return super().submit(texts, encoder=encoder or self.encoder, context=context)


@contextmanager
def running(encoder: FakeEncoder, limits: Limits = LIMITS, **options: object) -> Iterator[OfOneModel]:
    batcher = OfOneModel(encoder, limits, **options)
    batcher.start()
    try:
        yield batcher
    finally:
        encoder.gate.set()
        batcher.close(WITHIN_S)
        assert not batcher._thread.is_alive()


@contextmanager
def busy(encoder: FakeEncoder, limits: Limits = LIMITS, **options: object) -> Iterator[OfOneModel]:
    """A batcher whose encoder is held up inside a batch of one text, number 0."""
    encoder.gate.clear()
    with running(encoder, limits, **options) as batcher:
        batcher.submit(texts(0))
        assert encoder.began.wait(WITHIN_S)
        yield batcher
