"""Tokenising a very long text in slices, because a tokenizer takes some 700 bytes a token meanwhile.

Tokenizers work on words, so slices that end between words give the tokens of the whole. Whether these
did is checked at each seam; if not, the text is tokenised in one piece after all.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

    from sutra_tasks.engines.offsets import Integers

__all__ = ["SLICE_CHARS", "tokenize_in_slices"]

SLICE_CHARS: Final = 100_000
SEAM_CHARS: Final = 512
"""Characters on either side of a seam that are tokenised once more; their inner half is compared."""


def tokenize_in_slices(tokenizer: Tokenizer, text: str) -> tuple[NDArray[np.int32], Integers]:
    """Return the ids of a text, without special tokens, and their characters: (tokens, 2)."""
    cuts = _cuts(text)
    parts = [_tokenize(tokenizer, text, start, end) for start, end in pairwise(cuts)]
    ids, spans = (np.concatenate(column) for column in zip(*parts, strict=True))
    if all(_holds(tokenizer, text, ids, spans, cut) for cut in cuts[1:-1]):
        return ids, spans
    return _tokenize(tokenizer, text, 0, len(text))


def _cuts(text: str) -> list[int]:
    """Return where slices begin and end: in front of white space, if there is some."""
    cuts = [0]
    while len(text) - cuts[-1] > SLICE_CHARS:
        least, most = cuts[-1] + SLICE_CHARS // 2, cuts[-1] + SLICE_CHARS
        found = max(text.rfind(space, least, most) for space in "\n ")
        cuts.append(found if found > 0 else most)
    return [*cuts, len(text)]


def _tokenize(
    tokenizer: Tokenizer, text: str, start: int, end: int
) -> tuple[NDArray[np.int32], Integers]:
    found = tokenizer.encode(text[start:end], add_special_tokens=False)
    spans = np.array(found.offsets, dtype=np.int64).reshape(-1, 2)
    return np.array(found.ids, dtype=np.int32), spans + start


def _holds(tokenizer: Tokenizer, text: str, ids: NDArray[np.int32], spans: Integers, cut: int) -> bool:
    """Say whether the tokens around a seam are those of a text without one."""
    start, end = max(0, cut - SEAM_CHARS), min(len(text), cut + SEAM_CHARS)
    there = _tokenize(tokenizer, text, start, end)
    if np.any((there[1][:, 0] < cut) & (there[1][:, 1] > cut)):
        return False  # a token reaches over it
    least, most = cut - SEAM_CHARS // 2, cut + SEAM_CHARS // 2
    ours, theirs = (
        [column[(near[:, 0] >= least) & (near[:, 1] <= most)] for column in (found, near)]
        for found, near in ((ids, spans), there)
    )
    return all(map(np.array_equal, ours, theirs))
