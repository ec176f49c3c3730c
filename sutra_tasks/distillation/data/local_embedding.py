"""Embeds texts in this process, without a fleet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from sutra_tasks.engines.encoder import cut_to_window
from sutra_tasks.vectors import finish

if TYPE_CHECKING:
    from sutra_tasks.engines.encoder import Encoder
    from sutra_tasks.vectors import Floats

__all__ = ["AT_ONCE", "embed_locally"]

AT_ONCE: Final = 256
"""Texts in one batch."""


def embed_locally(encoder: Encoder, texts: Sequence[str]) -> Floats:
    """Return unit vectors of texts, float32, shape (texts, width).

    Long texts are cut at the model's window.

    Args:
        encoder: the engine; no other thread may use it meanwhile.
        texts: any number.
    """
    rows = np.empty((len(texts), encoder.info.width), dtype=np.float32)
    for start in range(0, len(texts), AT_ONCE):
        some = encoder.tokenize(list(texts[start : start + AT_ONCE]), None)
        batch = [cut_to_window(encoder, text) for text in some]
        rows[start : start + len(batch)] = encoder.encode(batch)
    return finish(rows, dimensions=None, normalize=True)
