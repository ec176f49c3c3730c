"""An engine that takes the time of a GPU without using the processor.

A batch takes ``fixed_s + per_token_s * tokens`` seconds, with all texts padded to the longest of the
batch as on a real device. Vectors depend only on the text, the model's name and the width, so all
workers agree. So a laptop can run a fleet of sixteen "GPUs" with the real broker, router and workers.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from sutra_tasks.engines.encoder import ModelInfo, TokenizedText
from sutra_tasks.engines.offsets import Offsets
from sutra_tasks.errors import CorruptMessageError

if TYPE_CHECKING:
    from sutra_tasks.vectors import Floats

__all__ = ["SimulatedEncoder", "vectors_of"]

WINDOW: Final = 512
SPECIAL_TOKENS: Final = 2
SPACES: Final = np.array([code for code in range(0x3001) if chr(code).isspace()], dtype=np.uint32)
"""The characters at which ``str.split`` splits."""


def vectors_of(texts: Sequence[str], width: int) -> Floats:
    """Return unit vectors for ``texts``: float32, shape (len(texts), width).

    They are the bytes of SHAKE-256 of each text, read as integers, centred and normalised.
    """
    digests = b"".join(hashlib.shake_256(text.encode()).digest(2 * width) for text in texts)
    integers = np.frombuffer(digests, dtype="<i2").reshape(len(texts), width)
    rows = integers.astype(np.float32) + np.float32(0.5)  # never the zero vector
    unit: Floats = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


class SimulatedEncoder:
    """A simulated model; see the module."""

    def __init__(
        self,
        *,
        model: str = "simulated",
        width: int = 384,
        fixed_s: float = 0.0,
        per_token_s: float = 0.0,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._salt = "" if model == "simulated" else model
        self.info = ModelInfo(
            model=model,
            space=f"simulated-1{self._salt and f'-{model}'}:{width}",
            width=width,
            window=WINDOW,
            prompts={"query": "", "document": ""},
        )
        self._fixed_s, self._per_token_s = fixed_s, per_token_s
        self._sleep, self._clock = sleep, clock

    def tokenize(self, texts: Sequence[str], prompt: str | None) -> list[TokenizedText]:
        """Return texts with one token for each word."""
        prefix = self.info.prompts[prompt] if prompt else ""
        return [TokenizedText(len(text.split()) + SPECIAL_TOKENS, prefix + text) for text in texts]

    def offsets(self, text: TokenizedText) -> Offsets:
        """Return the positions of the text's words."""
        characters = np.frombuffer(text.content.encode("utf-32-le"), dtype="<u4")
        of_word = np.concatenate([[False], ~np.isin(characters, SPACES), [False]])
        edges = np.flatnonzero(of_word[1:] != of_word[:-1])
        return Offsets(edges[::2], edges[1::2])

    def windows(
        self, text: TokenizedText, offsets: Offsets, spans: Sequence[tuple[int, int]]
    ) -> list[TokenizedText]:
        """Return slices of the text, each from the start of a word to the end of a word."""
        return [
            TokenizedText(
                stop - start + SPECIAL_TOKENS,
                text.content[offsets.starts[start] : offsets.ends[stop - 1]],
            )
            for start, stop in spans
        ]

    def encode(self, batch: Sequence[TokenizedText]) -> Floats:
        """Return the vectors after the time that the device would take."""
        began = self._clock()
        # Salted, so that another model has other vectors.
        vectors = vectors_of([self._salt + text.content for text in batch], self.info.width)
        padded = len(batch) * max(text.tokens for text in batch)
        pause_s = self._fixed_s + self._per_token_s * padded - (self._clock() - began)
        if pause_s > 0:
            self._sleep(pause_s)
        return vectors

    def pool(self, text: TokenizedText, spans: Sequence[tuple[int, int]]) -> Floats:
        """Raise an error: a simulated model has no states of tokens to pool."""
        raise NotImplementedError

    def pack(self, batch: Sequence[TokenizedText]) -> dict[str, Any]:
        """Return the texts and their numbers of tokens."""
        return {"texts": [[text.tokens, text.content] for text in batch]}

    def unpack(self, packed: Mapping[str, Any]) -> list[TokenizedText]:
        """Return the packed texts.

        Raises:
            CorruptMessageError: :meth:`pack` did not pack them.
        """
        try:
            return [TokenizedText(int(tokens), str(content)) for tokens, content in packed["texts"]]
        except (KeyError, TypeError, ValueError):
            raise CorruptMessageError("the texts of a part") from None
