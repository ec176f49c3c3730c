"""Golden vectors: the vectors of a few known texts, by which wrong vectors are found.

A worker that joins compares its golden vectors with the fleet's, and a running worker with those that it
computed when it started. Wrong vectors look like right ones; only a comparison shows the difference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from kombu.utils import json as kombu_json

from sutra_tasks.engines.encoder import cut_to_window
from sutra_tasks.errors import CorruptResultError, UnsupportedVersionError
from sutra_tasks.vectors import Vectors, finish

if TYPE_CHECKING:
    from sutra_tasks.engines.encoder import Encoder
    from sutra_tasks.vectors import Floats

__all__ = [
    "GOLDEN_TEXTS",
    "LEAST_COSINE",
    "VERSION",
    "GoldenVectors",
    "agree",
    "compute_golden_vectors",
    "lowest_cosine",
]

VERSION: Final = 1
"""Changes with the form and with the texts: vectors of other texts cannot be compared."""

GOLDEN_TEXTS: Final = (
    "a",
    "A red bicycle leans against a wall.",
    "Отправьте заявку до пятницы.",
    "量子计算机利用叠加态。",
    "for i in range(10): print(f'{i}: {i ** 2}')  # 🙂 squares, " * 4,
)

LEAST_COSINE: Final = 0.995
"""The lowest cosine between vectors that count as equal. A fleet may mix precisions: bfloat16 gives
0.9999 with six layers and somewhat less with deep models. A missing prompt gives 0.6 for the worst text,
another pooling 0.2 (measured with all-MiniLM-L6-v2)."""


@dataclass(frozen=True, slots=True, eq=False)
class GoldenVectors:
    """The vectors of :data:`GOLDEN_TEXTS` in one embedding space: float32, one unit row a text."""

    space: str
    vectors: Floats

    @classmethod
    def of(cls, encoder: Encoder) -> GoldenVectors:
        """Compute them; call it only from the thread that calls ``encode``."""
        return cls(encoder.info.space, compute_golden_vectors(encoder))

    def fault(self) -> str | None:
        """Return why a model with these vectors cannot serve; None if it can.

        A text may have a vector of zeros: one in a script that the model's vocabulary lacks.
        """
        if not np.isfinite(self.vectors).all():
            return "its vectors of known texts are not numbers: are its weights damaged?"
        if not self.vectors.any():
            return "its vectors of all known texts are zero: are its weights or its tokenizer damaged?"
        return None

    def disagreement(self, fleets: GoldenVectors) -> str | None:
        """Return why a worker with these vectors must not join a fleet with those; None if it may."""
        if self.space != fleets.space:
            return f"another embedding space: {self.space}, the fleet serves {fleets.space}"
        if self.vectors.shape != fleets.vectors.shape:
            ours, theirs = (_shape(one.vectors) for one in (self, fleets))
            return f"its vectors have another shape: {ours}, the fleet's {theirs}"
        if agree(self.vectors, fleets.vectors):
            return None
        cosine = lowest_cosine(self.vectors, fleets.vectors)
        return f"its vectors differ from the fleet's: cosine {cosine:.2f}"

    def to_json(self) -> str:
        """Return them as JSON: a version, the space, and the vectors as results store them."""
        stored: str = kombu_json.dumps(
            {"v": VERSION, "space": self.space, "vectors": Vectors.of(self.vectors)}
        )
        return stored

    @classmethod
    def from_json(cls, text: str | bytes) -> GoldenVectors:
        """Read them from JSON.

        Raises:
            UnsupportedVersionError: another release wrote it.
            CorruptResultError: it is damaged.
        """
        try:
            value: Any = kombu_json.loads(text)
        except ValueError:
            raise CorruptResultError("golden vectors are not JSON") from None
        if not isinstance(value, dict):
            raise CorruptResultError("golden vectors are not an object")
        if value.get("v") != VERSION:
            raise UnsupportedVersionError("golden vectors", str(value.get("v"))[:20], VERSION)
        space, vectors = value.get("space"), value.get("vectors")
        if not isinstance(space, str) or not isinstance(vectors, Vectors):
            raise CorruptResultError("golden vectors need a space and vectors")
        if vectors.ndim != 2 or len(vectors) != len(GOLDEN_TEXTS):  # noqa: PLR2004 - a matrix
            raise CorruptResultError(f"golden vectors of shape {_shape(vectors)}")
        return cls(space, np.asarray(vectors))


def compute_golden_vectors(encoder: Encoder) -> Floats:
    """Return the vectors of :data:`GOLDEN_TEXTS`: float32 unit rows, shape (5, width)."""
    texts = encoder.tokenize(GOLDEN_TEXTS, None)
    rows = encoder.encode([cut_to_window(encoder, text) for text in texts])
    with np.errstate(all="ignore"):  # a comparison reports what is wrong with them
        return finish(rows, dimensions=None, normalize=True)


def lowest_cosine(ours: Floats, theirs: Floats) -> float:
    """Return the lowest cosine of equal rows of two arrays.

    A row that is zero in both arrays is equal, because a text without a known token has no other vector.
    NaN if a row is zero in one of them only or not finite, or if all rows are zero.
    """
    compared = ours.any(axis=1) | theirs.any(axis=1)
    if not compared.any():
        return float("nan")
    one, other = ours[compared].astype(np.float64), theirs[compared].astype(np.float64)
    with np.errstate(all="ignore"):  # infinities and rows of zeros end as NaN, which min() keeps
        lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
        return float(np.min(np.sum(one * other, axis=1) / lengths))


def agree(ours: Floats, theirs: Floats, *, least_cosine: float = LEAST_COSINE) -> bool:
    """Return whether two arrays have the same rows, up to precision."""
    return ours.shape == theirs.shape and lowest_cosine(ours, theirs) >= least_cosine


def _shape(array: Floats) -> str:
    return "x".join(map(str, array.shape))
