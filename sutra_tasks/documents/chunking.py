"""Where a long text is cut: windows over its tokens, with overlap.

Everything counts in tokens of the one tokenisation of the whole text; characters come from its offsets,
so a chunk's text is a slice of the original and nothing is decoded or tokenised twice. The laws:

1. Every token is in a chunk, and chunks hold nothing else.
2. Chunks start and end in ascending order; the last one ends with the text.
3. Two neighbours share ``overlap`` tokens; the last two at least so many.
4. No chunk holds more than ``block`` tokens.

A boundary retreats by up to 15 % of the block to the end of a sentence, else of a word. A last window
with less than 25 % of new tokens moves back until it is full: a chunk of three words is a poor vector.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sutra_tasks.engines.offsets import Offsets

__all__ = [
    "MOST_OVERLAP",
    "ChunkInfo",
    "Chunker",
    "boundary",
    "chunks_of",
    "is_word_start",
]

MOST_OVERLAP: Final = 0.85
"""Of the block: with as much retreat as is allowed, chunks would not advance beyond it."""

RETREAT: Final = 1 - MOST_OVERLAP
LEAST_NEW: Final = 0.25
"""Of the block: new tokens below which the last window moves back."""

SENTENCE_ENDS: Final = frozenset(".!?…。！？｡؟।")  # noqa: RUF001 - of many scripts
CLOSING: Final = "\"')]}»”’」』）】"  # noqa: RUF001 - of many scripts
ANY_END: Final = re.compile(f"[{re.escape(''.join(SENTENCE_ENDS))}]|\n\\s*\n")
NEAR: Final = 16
"""Characters that are looked at on either side of a cut; without an end, some texts take minutes."""


@dataclass(frozen=True, slots=True, repr=False)
class ChunkInfo:
    """One chunk of a text: its tokens from ``start_pos`` to before ``end_pos``, and their characters.

    ``text`` is the characters from ``start_char`` to before ``end_char``.
    """

    text: str
    start_pos: int
    end_pos: int
    is_final: bool
    start_char: int
    end_char: int

    def __repr__(self) -> str:
        return f"<ChunkInfo tokens {self.start_pos}:{self.end_pos}>"


@dataclass(frozen=True, slots=True)
class Chunker:
    """Cuts texts into windows of up to ``block`` tokens that overlap by ``overlap``.

    Raises:
        ValueError: the block is empty, or the overlap is over 85 % of it, so that it might not advance.
    """

    block: int
    overlap: int

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"a block of {self.block} tokens holds no text")
        if not 0 <= self.overlap <= MOST_OVERLAP * self.block:
            raise ValueError(
                f"an overlap of {self.overlap} tokens must be 0 to {int(MOST_OVERLAP * self.block)}: "
                f"85 % of a block of {self.block}"
            )

    def spans(self, text: str, offsets: Offsets) -> list[tuple[int, int]]:
        """Return the windows of a text as spans of its tokens; none of a text without tokens."""
        total = len(offsets)
        # Half of the way at least is kept, or a large overlap would make very many chunks.
        retreat = min(int(RETREAT * self.block), (self.block - self.overlap) // 2)
        found: list[tuple[int, int]] = []
        start, end = 0, 0
        while end < total:
            if start + self.block >= total:
                if found and total - end < LEAST_NEW * self.block:
                    start = total - self.block
                stop = total
            else:
                stop = boundary(text, offsets, start + self.block - retreat, start + self.block)
            found.append((start, stop))
            start, end = stop - self.overlap, stop
        return found


def chunks_of(text: str, offsets: Offsets, spans: list[tuple[int, int]]) -> Iterator[ChunkInfo]:
    """Yield what :meth:`Chunker.spans` found, with characters."""
    # A tokenizer may name a character later than the next token's: spans still go forward.
    starts = np.minimum.accumulate(offsets.starts[::-1])[::-1]
    ends = np.maximum.accumulate(offsets.ends)
    for start, end in spans:
        start_char, end_char = int(starts[start]), int(ends[end - 1])
        yield ChunkInfo(text[start_char:end_char], start, end, end == len(offsets), start_char, end_char)


def boundary(text: str, offsets: Offsets, least: int, most: int) -> int:
    """Return the last good place to cut: a count of tokens from ``least`` to ``most``.

    Args:
        text: the text.
        offsets: of its tokens; more than ``most``.
        least: tokens before the cut, 1 at least.
        most: tokens before the cut.
    """
    word = 0
    befores = offsets.ends[least - 1 : most].tolist()
    afters = offsets.starts[least : most + 1].tolist()
    # Most of the time goes into looking for what is not there.
    sentences = ANY_END.search(text, max(0, min(befores) - 2 * NEAR), max(afters) + NEAR)
    for at in range(most, least - 1, -1):
        before, after = befores[at - least], afters[at - least]
        if after < before:
            continue  # within a character
        if word and sentences is None:
            break
        space = _space_around(text, before, after)
        if _ends_sentence(text, space):
            return at
        if not word and _ends_word(text, space):
            word = at
    return word or most


def is_word_start(text: str, at: int) -> bool:
    """Say whether a cut before the character at ``at`` leaves every word whole."""
    return not (0 < at < len(text) and _is_of_word(text[at - 1]) and _is_of_word(text[at]))


def _space_around(text: str, start: int, end: int) -> slice:
    """Return the white space around a cut, as far as it matters, and what was dropped there.

    Some tokenizers count a space to the token that follows, some to none, and some are white space.
    """
    least, most = max(0, start - NEAR), end + NEAR
    while start > least and text[start - 1].isspace():
        start -= 1
    while end < most and text[end : end + 1].isspace():
        end += 1
    return slice(start, end)


def _ends_sentence(text: str, space: slice) -> bool:
    if text[space].count("\n") > 1:
        return True  # a paragraph does
    last = text[max(0, space.start - NEAR) : space.start].rstrip(CLOSING)[-1:]
    # A full stop with nothing behind it is a decimal point, or part of a name.
    return last in SENTENCE_ENDS and (space.start < space.stop or not last.isascii())


def _ends_word(text: str, space: slice) -> bool:
    # What the tokenizer dropped counts as it is: a word does not end at an accent that BERT strips.
    return not all(map(_is_of_word, text[max(0, space.start - 1) : space.stop + 1]))


def _is_of_word(character: str) -> bool:
    # Vowel signs of Indic scripts and combining accents are marks, which isalnum() leaves out.
    return character.isalnum() or unicodedata.category(character)[0] == "M"
