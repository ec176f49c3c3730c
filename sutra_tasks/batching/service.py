"""Answers a call on one device: tokenize, chunk, compute in the batcher, aggregate and normalize."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np

from sutra_tasks.batching.jobs import (
    NO_CONTEXT,
    DeviceBroken,
    Drained,
    Encoded,
    TextError,
    Unwanted,
)
from sutra_tasks.chunking.answer import AggregationError, answer
from sutra_tasks.chunking.chunked_call import CallChunker
from sutra_tasks.client.call import estimated_tokens
from sutra_tasks.engines.encoder import check_options
from sutra_tasks.errors import EncodingError

if TYPE_CHECKING:
    from sutra_tasks.batching.batcher import Batcher
    from sutra_tasks.batching.jobs import JobContext
    from sutra_tasks.chunking.chunked_call import ChunkedCall
    from sutra_tasks.client.call import Call
    from sutra_tasks.engines.encoder import Encoder, TokenizedText
    from sutra_tasks.settings import Settings
    from sutra_tasks.vectors import Embeddings, Floats, Vectors

__all__ = ["EmbeddingService", "OnAnswer", "Prepared"]


class OnAnswer(Protocol):
    """Told of each answered call: seconds in all and of compute, and its tokens."""

    def __call__(self, seconds: float, *, compute_s: float, estimated_tokens: int, tokens: int) -> None:
        """Count it; from any thread."""


@dataclass(frozen=True, slots=True, repr=False)
class Prepared:
    """A call that is tokenized and chunked.

    Attributes:
        call: what the caller sent.
        chunked: its rows, and how their vectors become those of its texts.
        began_at: when work on it began, by the monotonic clock.
    """

    call: Call
    chunked: ChunkedCall
    began_at: float

    @property
    def can_spread(self) -> bool:
        """Whether several devices may compute its rows: late chunking needs a long text in one place."""
        return not self.chunked.late_windows


class EmbeddingService:
    """Answers calls with one model; safe to use from many threads."""

    def __init__(
        self,
        encoder: Encoder,
        batcher: Batcher,
        device: str,
        options: Settings,
        *,
        on_answer: OnAnswer | None = None,
    ) -> None:
        """Check the settings for long texts against the model.

        Args:
            encoder: the model; its ``encode`` and ``pool`` run on the batcher's thread only.
            batcher: computes the rows.
            device: the device's name, for details of answers and for errors.
            options: how texts are chunked and aggregated.
            on_answer: told of each answered call.

        Raises:
            ModelError: they do not fit it.
        """
        self.encoder, self._batcher, self._device = encoder, batcher, device
        self._chunker = CallChunker(encoder, options)
        self._on_answer = on_answer

    def prepare(self, call: Call) -> Prepared:
        """Tokenize and chunk a call's texts.

        Raises:
            InvalidOptionError: this model has no such prompt or width.
        """
        began_at = time.monotonic()
        check_options(self.encoder.info, call.prompt, call.dimensions)
        return Prepared(call, self._chunker.chunk(call), began_at)

    def answer(self, prepared: Prepared, context: JobContext = NO_CONTEXT) -> Vectors | Embeddings:
        """Embed the texts of a call; arguments and errors are those of :meth:`encode`."""
        call, info, chunked = prepared.call, self.encoder.info, prepared.chunked
        encoded = self._encode(chunked.rows, chunked.position_of, context)
        if chunked.late_windows:
            encoded = self._with_late_windows(chunked, encoded, context)
        self._count(
            encoded,
            [*chunked.rows, *(one.text for one in chunked.late_windows)],
            estimated_tokens=estimated_tokens(len(call.texts), call.bytes),
            began_at=prepared.began_at,
        )
        try:
            return answer(
                call,
                chunked.layout,
                encoded.rows,
                model=info.model,
                space=info.space,
                device=self._device,
                queue_s=encoded.queue_s,
                compute_s=encoded.compute_s,
            )
        except AggregationError as error:
            raise EncodingError(self._device, error.position, error.reason) from None

    def encode(
        self,
        rows: Sequence[TokenizedText],
        position_of: Callable[[int], int],
        context: JobContext = NO_CONTEXT,
        *,
        estimated_tokens: int,
        began_at: float,
    ) -> Encoded:
        """Embed rows.

        Args:
            rows: none over the model's window.
            position_of: the text of the call to which a row belongs.
            context: what the caller knows of the job.
            estimated_tokens: what the rows count as in the device's speed.
            began_at: when work on them began, by the monotonic clock.

        Raises:
            EncodingError: the engine failed on one of the texts.
            Drained: the worker is stopping and the texts had not begun.
            Unwanted: the call was revoked or expired, as ``context`` said.
            DeviceBroken: the engine failed, and not because of a text.
        """
        encoded = self._encode(rows, position_of, context)
        self._count(encoded, rows, estimated_tokens=estimated_tokens, began_at=began_at)
        return encoded

    def _encode(
        self, rows: Sequence[TokenizedText], position_of: Callable[[int], int], context: JobContext
    ) -> Encoded:
        if not rows:
            self._batcher.withdraw(context.announcement)
            return Encoded(np.empty((0, self.encoder.info.width), dtype=np.float32), 0.0, 0.0)
        try:
            return self._batcher.submit(rows, encoder=self.encoder, context=context).result()
        except TextError as error:
            # The engine's words may hold the text: only their kind is passed on.
            raise EncodingError(
                self._device, position_of(error.position), type(error.cause).__name__
            ) from None
        except DeviceBroken as error:
            raise DeviceBroken(position_of(error.position)) from None

    def _with_late_windows(self, chunked: ChunkedCall, encoded: Encoded, context: JobContext) -> Encoded:
        """Run the passes of late chunking, one at a time: other calls' batches run between two."""
        rows = np.empty((chunked.layout.row_count, self.encoder.info.width), dtype=np.float32)
        rows[chunked.row_numbers()] = encoded.rows
        compute_s, began_s = encoded.compute_s, time.monotonic()
        for one in chunked.late_windows:
            if not context.is_wanted():
                raise Unwanted
            future = self._batcher.call(partial(_timed, partial(self.encoder.pool, one.text, one.spans)))
            try:
                found, seconds = future.result()
            except Drained:
                raise
            except Exception as error:  # noqa: BLE001 - whatever an engine raises
                position = chunked.layout.positions[one.first_row]
                raise EncodingError(self._device, position, type(error).__name__) from None
            rows[one.row_numbers] = found
            compute_s += seconds
        queue_s = encoded.queue_s + time.monotonic() - began_s - (compute_s - encoded.compute_s)
        return Encoded(rows, queue_s, compute_s)

    def _count(
        self,
        encoded: Encoded,
        seen: Sequence[TokenizedText],
        *,
        estimated_tokens: int,
        began_at: float,
    ) -> None:
        if self._on_answer is not None:
            self._on_answer(
                time.monotonic() - began_at,
                compute_s=encoded.compute_s,
                estimated_tokens=estimated_tokens,
                tokens=sum(text.tokens for text in seen),
            )


def _timed(function: Callable[[], Floats]) -> tuple[Floats, float]:
    """Return what a function returns, and the seconds that it took."""
    began = time.monotonic()
    return function(), time.monotonic() - began
