"""Tokenises a very long text in slices: a tokenizer needs some 700 bytes of memory for each token.

Tokenizers work on words, so slices that end between words give the tokens of the whole text. This is
checked at each seam; where it does not hold, the text is tokenised in one piece.
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
"""Characters on each side of a seam that are tokenised again; their inner half is compared."""


def tokenize_in_slices(tokenizer: Tokenizer, text: str) -> tuple[NDArray[np.int32], Integers]:
    """Return a text's token ids, without special tokens, and their offsets of shape (tokens, 2)."""
    cuts = _cuts(text)
    parts = [_tokenize(tokenizer, text, start, end) for start, end in pairwise(cuts)]
    ids, spans = (np.concatenate(column) for column in zip(*parts, strict=True))
    if all(_seam_is_right(tokenizer, text, ids, spans, cut) for cut in cuts[1:-1]):
        return ids, spans
    return _tokenize(tokenizer, text, 0, len(text))


def _cuts(text: str) -> list[int]:
    """Return where slices begin and end: before white space, if there is any."""
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


def _seam_is_right(
    tokenizer: Tokenizer, text: str, ids: NDArray[np.int32], spans: Integers, cut: int
) -> bool:
    """Return whether the tokens around a seam are the same as without the seam."""
    start, end = max(0, cut - SEAM_CHARS), min(len(text), cut + SEAM_CHARS)
    there = _tokenize(tokenizer, text, start, end)
    if np.any((there[1][:, 0] < cut) & (there[1][:, 1] > cut)):
        return False  # a token reaches over the seam
    least, most = cut - SEAM_CHARS // 2, cut + SEAM_CHARS // 2
    ours, theirs = (
        [column[(near[:, 0] >= least) & (near[:, 1] <= most)] for column in (found, near)]
        for found, near in ((ids, spans), there)
    )
    return all(map(np.array_equal, ours, theirs))
