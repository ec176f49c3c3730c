"""The layout of a call's rows, and the answer that it makes of their vectors.

Each text of a call is one row of the engine, or one row for each chunk. The layout says which rows are
of which text. It is JSON, so that several devices can compute the rows and one makes the answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from sutra_tasks.chunking.weights import aggregate
from sutra_tasks.errors import CorruptMessageError, UnsupportedVersionError
from sutra_tasks.vectors import Embeddings, Vectors, finish

if TYPE_CHECKING:
    from sutra_tasks.client.call import Call
    from sutra_tasks.vectors import Floats

__all__ = ["AggregationError", "AnswerLayout", "TextLayout", "answer"]

VERSION: Final = 1


class AggregationError(Exception):
    """The vectors of a text's chunks make no vector; an ``EncodingError`` where the device is known."""

    def __init__(self, position: int, reason: str) -> None:
        super().__init__(position, reason)
        self.position, self.reason = position, reason


@dataclass(frozen=True, slots=True)
class TextLayout:
    """The rows of one text.

    Attributes:
        tokens: of the whole text, special tokens and prompt included; of a truncated one, of what is
            left.
        spans: the characters of each row, as start and end.
        weights: how much the vector of each row counts; they add up to 1.
        truncated: whether the end of the text was cut off.
    """

    tokens: int
    spans: tuple[tuple[int, int], ...]
    weights: tuple[float, ...]
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class AnswerLayout:
    """The rows of a call, by text, and the method that makes one vector of several."""

    texts: tuple[TextLayout, ...]
    method: str

    @property
    def row_count(self) -> int:
        """The rows of all texts."""
        return sum(len(text.spans) for text in self.texts)

    @property
    def chunk_count(self) -> int:
        """The rows of the texts that have several."""
        return sum(len(text.spans) for text in self.texts if len(text.spans) > 1)

    @property
    def positions(self) -> list[int]:
        """The position of the text to which each row belongs."""
        return [position for position, text in enumerate(self.texts) for _ in text.spans]

    def to_json(self) -> dict[str, Any]:
        """Return the layout as JSON."""
        texts = [[text.tokens, text.spans, text.weights, text.truncated] for text in self.texts]
        return {"v": VERSION, "method": self.method, "texts": texts}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> AnswerLayout:
        """Read what :meth:`to_json` returned.

        Raises:
            UnsupportedVersionError: another version of this package wrote it.
            CorruptMessageError: it is something else.
        """
        if value.get("v") != VERSION:
            raise UnsupportedVersionError("plan", str(value.get("v"))[:20], VERSION)
        try:
            texts = tuple(
                TextLayout(
                    tokens, tuple((start, end) for start, end in spans), tuple(weights), truncated
                )
                for tokens, spans, weights, truncated in value["texts"]
            )
            return cls(texts, value["method"])
        except (KeyError, TypeError, ValueError):
            raise CorruptMessageError("the plan of a long text") from None


def answer(
    call: Call,
    layout: AnswerLayout,
    rows: Floats,
    *,
    model: str,
    space: str,
    device: str,
    queue_s: float,
    compute_s: float,
) -> Vectors | Embeddings:
    """Return the answer to a call from the vectors of its rows.

    A Matryoshka width is cut from the rows: chunks are weighed as vectors of that width.

    Args:
        call: what was asked; its texts are not used.
        layout: of its rows.
        rows: float32, shape (rows, width), as the engine gave them.
        model: the model's name.
        space: the embedding space of ``rows``.
        device: the device that computed them, or several, separated by commas.
        queue_s: seconds they waited.
        compute_s: seconds they took.

    Raises:
        AggregationError: the vectors of a text's chunks make no vector.
    """
    rows = finish(rows, dimensions=call.dimensions, normalize=False)
    found = _vectors_of_texts(layout, rows) if layout.chunk_count else rows
    found = finish(found, dimensions=None, normalize=call.normalize)
    vectors = Vectors.of(found[0] if call.single else found)
    if not call.details:
        return vectors
    chunk_vectors = None
    if call.chunk_vectors:
        chunk_vectors = Vectors.of(finish(rows, dimensions=None, normalize=call.normalize))
    return Embeddings(
        vectors=vectors,
        space=f"{space.rpartition(':')[0]}:{rows.shape[1]}",
        model=model,
        tokens=tuple(text.tokens for text in layout.texts),
        chunks=tuple(len(text.spans) for text in layout.texts),
        truncated=tuple(text.truncated for text in layout.texts),
        spans=tuple(text.spans for text in layout.texts),
        weights=tuple(text.weights for text in layout.texts),
        chunk_vectors=chunk_vectors,
        device=device,
        queue_s=queue_s,
        compute_s=compute_s,
    )


def _vectors_of_texts(layout: AnswerLayout, rows: Floats) -> Floats:
    found: Floats = np.empty((len(layout.texts), rows.shape[1]), dtype=np.float32)
    start = 0
    for position, text in enumerate(layout.texts):
        stop = start + len(text.spans)
        found[position] = rows[start]
        if stop - start > 1:
            try:
                found[position] = aggregate(rows[start:stop], np.array(text.weights), layout.method)
            except ValueError as error:
                raise AggregationError(position, str(error)) from None
        start = stop
    return found
