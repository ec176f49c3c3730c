"""A call answered by one device: tokenise, batch, cut and normalise."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import numpy as np

from sutra_tasks.calls import estimated_tokens
from sutra_tasks.encoding.batcher import TextError
from sutra_tasks.encoding.encoder import check_options
from sutra_tasks.errors import EncodingError
from sutra_tasks.vectors import Embeddings, Vectors, finish

if TYPE_CHECKING:
    from sutra_tasks.calls import Call
    from sutra_tasks.encoding.batcher import Batcher
    from sutra_tasks.encoding.encoder import Encoder

__all__ = ["EmbeddingService"]


class OnAnswer(Protocol):
    """Told of each answered call: seconds in all and of compute, and its tokens."""

    def __call__(self, seconds: float, *, compute_s: float, estimated_tokens: int, tokens: int) -> None:
        """Count it; from any thread."""


class EmbeddingService:
    """What a device worker does with a call; safe to use from many threads."""

    def __init__(
        self,
        encoder: Encoder,
        batcher: Batcher,
        device: str,
        *,
        on_answer: OnAnswer | None = None,
    ) -> None:
        self._encoder, self._batcher, self._device = encoder, batcher, device
        self._on_answer = on_answer

    def answer(
        self,
        call: Call,
        *,
        submitted: Callable[[], None] = lambda: None,
        alone: bool = False,
        wanted: Callable[[], bool] = lambda: True,
    ) -> Vectors | Embeddings:
        """Embed one call's texts.

        Args:
            call: what is asked.
            submitted: called once the texts are with the batcher, or will not be.
            alone: share no batch with other calls.
            wanted: asked before each batch, on the batcher's thread, whether to go on; quick.

        Raises:
            InvalidOptionError: this model has no such prompt or width.
            EncodingError: the engine failed on one of the texts.
            Drained: the worker is stopping and the texts had not begun.
            Unwanted: the call was given up, as ``wanted`` said.
            DeviceBroken: the engine failed, and not because of a text.
        """
        began = time.monotonic()
        card = self._encoder.card
        check_options(card, call.prompt, call.dimensions)
        texts = self._encoder.tokenize(call.texts, call.prompt) if call.texts else []
        queue_s = compute_s = 0.0
        if texts:
            future = self._batcher.submit(texts, alone=alone, wanted=wanted)
            submitted()
            try:
                encoded = future.result()
            except TextError as error:
                # The engine's words may hold the text: only their kind is passed on.
                raise EncodingError(self._device, error.position, type(error.cause).__name__) from None
            rows, queue_s, compute_s = encoded.rows, encoded.queue_s, encoded.compute_s
        else:
            submitted()
            rows = np.empty((0, card.width), dtype=np.float32)
        rows = finish(rows, dimensions=call.dimensions, normalize=call.normalize)
        vectors = Vectors.of(rows[0] if call.single else rows)
        if self._on_answer is not None:
            self._on_answer(
                time.monotonic() - began,
                compute_s=compute_s,
                estimated_tokens=estimated_tokens(len(call.texts), call.bytes),
                tokens=sum(text.tokens for text in texts),
            )
        if not call.details:
            return vectors
        return Embeddings(
            vectors=vectors,
            space=f"{card.space.rpartition(':')[0]}:{rows.shape[1]}",
            model=card.model,
            tokens=tuple(text.tokens for text in texts),
            chunks=(1,) * len(texts),
            truncated=tuple(text.truncated for text in texts),
            device=self._device,
            queue_s=queue_s,
            compute_s=compute_s,
        )
