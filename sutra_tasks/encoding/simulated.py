"""An engine that takes the time of a GPU without using the processor.

A batch takes ``fixed_s + per_token_s * tokens`` seconds, tokens padded to the longest of the batch as
on a real device. Vectors depend on nothing but the text and the width, so any two workers agree.
It lets a laptop drive a fleet of sixteen "GPUs" through the real broker, router and workers.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from sutra_tasks.encoding.encoder import Card, TokenizedText

if TYPE_CHECKING:
    from sutra_tasks.vectors import Floats

__all__ = ["SimulatedEncoder", "vectors_of"]

WINDOW: Final = 512
SPECIAL_TOKENS: Final = 2


def vectors_of(texts: Sequence[str], width: int) -> Floats:
    """Return the unit vectors that stand for ``texts``: float32, shape (len(texts), width).

    The bytes of SHAKE-256 of each text, read as integers, centred and normalised.
    """
    digests = b"".join(hashlib.shake_256(text.encode()).digest(2 * width) for text in texts)
    integers = np.frombuffer(digests, dtype="<i2").reshape(len(texts), width)
    rows = integers.astype(np.float32) + np.float32(0.5)  # never the zero vector
    unit: Floats = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


class SimulatedEncoder:
    """See the module's docstring."""

    def __init__(
        self,
        *,
        width: int = 384,
        fixed_s: float = 0.0,
        per_token_s: float = 0.0,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.card = Card(
            model="simulated",
            space=f"simulated-1:{width}",
            width=width,
            window=WINDOW,
            prompts={"query": "", "document": ""},
        )
        self._fixed_s, self._per_token_s = fixed_s, per_token_s
        self._sleep, self._clock = sleep, clock

    def tokenize(self, texts: Sequence[str], prompt: str | None) -> list[TokenizedText]:
        """Count words as tokens; the whole text decides the vector, so a cut one differs."""
        prefix = self.card.prompts[prompt] if prompt else ""
        prepared = []
        for text in texts:
            tokens = len(text.split()) + SPECIAL_TOKENS
            cut = tokens > WINDOW
            content = " ".join(text.split()[: WINDOW - SPECIAL_TOKENS]) if cut else text
            prepared.append(TokenizedText(min(tokens, WINDOW), cut, prefix + content))
        return prepared

    def encode(self, batch: Sequence[TokenizedText]) -> Floats:
        """Answer after as long as the device would take; making up vectors is part of that."""
        began = self._clock()
        vectors = vectors_of([text.content for text in batch], self.card.width)
        padded = len(batch) * max(text.tokens for text in batch)
        pause_s = self._fixed_s + self._per_token_s * padded - (self._clock() - began)
        if pause_s > 0:
            self._sleep(pause_s)
        return vectors
