"""What becomes of the texts of a call: the chunks of each, and their vectors as one answer.

The texts of a call, in order, are *rows* for the engine: a text within the threshold is one row, a
longer one a row for each chunk. A plan says which, and is JSON, so that rows can be computed in parts on
many devices, and put together on another one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from sutra_tasks.documents.weights import aggregate
from sutra_tasks.errors import CorruptMessageError, UnsupportedVersionError
from sutra_tasks.vectors import Embeddings, Vectors, finish

if TYPE_CHECKING:
    from sutra_tasks.client.call import Call
    from sutra_tasks.vectors import Floats

__all__ = ["Plan", "PlannedText", "Unaggregated", "answer", "parts_of"]

VERSION: Final = 1

PARTS_PER_DEVICE: Final = 2
"""More even out devices of different speeds, but each costs some 4 ms of processor time: with four of
them 64 chunks of 10 ms took 15 ms longer on four devices."""


class Unaggregated(Exception):  # noqa: N818 - becomes an EncodingError where the device is known
    """The vectors of a text's chunks make no vector."""

    def __init__(self, position: int, reason: str) -> None:
        super().__init__(position, reason)
        self.position, self.reason = position, reason


@dataclass(frozen=True, slots=True)
class PlannedText:
    """One text.

    Attributes:
        tokens: of the whole text, special tokens and prompt included; of what is left of a cut one.
        spans: the characters of each chunk; of a text that is not chunked, all of them.
        weights: what each chunk counts, adding up to 1.
        truncated: its end was cut off.
    """

    tokens: int
    spans: tuple[tuple[int, int], ...]
    weights: tuple[float, ...]
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """The texts of a call, and how the vectors of chunks become one."""

    texts: tuple[PlannedText, ...]
    method: str

    @property
    def rows(self) -> int:
        """Chunks of all texts, where a text that is not chunked is one."""
        return sum(len(text.spans) for text in self.texts)

    @property
    def chunks(self) -> int:
        """Chunks of the texts that have several."""
        return sum(len(text.spans) for text in self.texts if len(text.spans) > 1)

    @property
    def positions(self) -> list[int]:
        """The text to which each row belongs."""
        return [position for position, text in enumerate(self.texts) for _ in text.spans]

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON."""
        texts = [[text.tokens, text.spans, text.weights, text.truncated] for text in self.texts]
        return {"v": VERSION, "method": self.method, "texts": texts}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Plan:
        """Read what :meth:`to_json` made.

        Raises:
            UnsupportedVersionError: another version wrote it.
            CorruptMessageError: it is something else.
        """
        if value.get("v") != VERSION:
            raise UnsupportedVersionError("plan", str(value.get("v"))[:20], VERSION)
        try:
            texts = tuple(
                PlannedText(
                    tokens, tuple((start, end) for start, end in spans), tuple(weights), truncated
                )
                for tokens, spans, weights, truncated in value["texts"]
            )
            return cls(texts, value["method"])
        except (KeyError, TypeError, ValueError):
            raise CorruptMessageError("the plan of a long text") from None


def parts_of(
    tokens: Sequence[int], *, devices: int, most_tokens: int, least_tokens: float = 0
) -> list[range]:
    """Return how rows are spread: consecutive rows a part, none empty.

    As many parts as keep ``devices`` evenly busy, and none over ``most_tokens``, one batch: it stays
    possible to serve others between two, and to lose little with a device.

    Args:
        tokens: of each row.
        devices: that share the work.
        most_tokens: of a part, unless one row has more.
        least_tokens: that are worth a message, as far as ``most_tokens`` allows.
    """
    total = sum(tokens)
    fair = total / (PARTS_PER_DEVICE * max(1, devices))
    goal = min(most_tokens, max(fair, least_tokens, 1))
    goal = total / math.ceil(total / goal)  # or the last part would be what is left
    parts: list[range] = []
    start = held = 0
    for row, count in enumerate(tokens):
        # Whichever is nearer to the goal: with this row or without it.
        if held and (held + count > most_tokens or held + count / 2 > goal):
            parts.append(range(start, row))
            start, held = row, 0
        held += count
    parts.append(range(start, len(tokens)))
    return parts


def answer(
    call: Call,
    plan: Plan,
    rows: Floats,
    *,
    model: str,
    space: str,
    device: str,
    queue_s: float,
    compute_s: float,
) -> Vectors | Embeddings:
    """Return the answer to a call from the vectors of its rows.

    A Matryoshka width is cut from the rows: chunks are weighed as the vectors they are at that width.

    Args:
        call: what was asked; of its texts nothing is needed.
        plan: its plan.
        rows: float32, shape (rows, width), as the engine gave them.
        model: the model's name.
        space: the embedding space of ``rows``.
        device: who computed them.
        queue_s: seconds they waited.
        compute_s: seconds they took.

    Raises:
        Unaggregated: the vectors of a text's chunks make no vector.
    """
    found = rows = finish(rows, dimensions=call.dimensions, normalize=False)
    if plan.chunks:
        found = np.empty((len(plan.texts), rows.shape[1]), dtype=np.float32)
        start = 0
        for position, text in enumerate(plan.texts):
            stop = start + len(text.spans)
            found[position] = rows[start]
            if stop - start > 1:
                try:
                    found[position] = aggregate(rows[start:stop], np.array(text.weights), plan.method)
                except ValueError as error:
                    raise Unaggregated(position, str(error)) from None
            start = stop
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
        tokens=tuple(text.tokens for text in plan.texts),
        chunks=tuple(len(text.spans) for text in plan.texts),
        truncated=tuple(text.truncated for text in plan.texts),
        spans=tuple(text.spans for text in plan.texts),
        weights=tuple(text.weights for text in plan.texts),
        chunk_vectors=chunk_vectors,
        device=device,
        queue_s=queue_s,
        compute_s=compute_s,
    )
