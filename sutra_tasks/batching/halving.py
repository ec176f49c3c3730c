"""Computes a batch, and halves one that fails until the rows at fault stand alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sutra_tasks.engines.out_of_memory import is_out_of_memory

if TYPE_CHECKING:
    from sutra_tasks.engines.encoder import TokenizedText
    from sutra_tasks.vectors import Floats

__all__ = ["Outcome", "encode_by_halves"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a batch.

    Attributes:
        rows: float32 of shape (texts, width); those of failed texts mean nothing.
        errors: why a text has no row, by its index.
        too_large: the fewest padded tokens of several texts that did not fit into memory, if any.
    """

    rows: Floats
    errors: dict[int, Exception]
    too_large: int | None


def encode_by_halves(
    encode: Callable[[Sequence[TokenizedText]], Floats], texts: Sequence[TokenizedText], width: int
) -> Outcome:
    """Compute a batch; where the engine fails, halve it until the texts at fault stand alone.

    Args:
        encode: the engine's; may raise anything.
        texts: of the batch.
        width: of the engine's vectors.
    """
    rows = np.zeros((len(texts), width), dtype=np.float32)
    errors: dict[int, Exception] = {}
    too_large: int | None = None
    parts = [range(len(texts))]
    while parts:
        part = parts.pop()
        where = slice(part.start, part.stop)
        try:
            found = encode(texts[where])
            if found.shape != (len(part), width):
                raise ValueError(f"the engine gave rows of shape {found.shape}")  # noqa: TRY301
            rows[where] = found
            continue
        except Exception as error:  # noqa: BLE001 - whatever an engine raises belongs to its texts
            if len(part) == 1:
                # Its frames would keep what the failed pass allocated.
                errors[part.start] = error.with_traceback(None)
                continue
            if is_out_of_memory(error):
                padded = len(part) * max(text.tokens for text in texts[where])
                too_large = padded if too_large is None else min(too_large, padded)
        # After the handler: the error's frames, too, keep what the failed pass allocated.
        half = len(part) // 2
        parts += [part[half:], part[:half]]
    for index in np.flatnonzero(~np.isfinite(rows).all(axis=1)).tolist():
        errors[index] = FloatingPointError("the vector is not finite")
    return Outcome(rows, errors, too_large)
