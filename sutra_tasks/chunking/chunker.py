"""Cutting a long text into spans of its tokens that overlap.

A text is tokenised once, as a whole. Everything here counts those tokens, and their offsets give the
characters, so a chunk is a slice of the original text and is not tokenised again. The laws:

1. Every token is in a chunk, and chunks hold nothing else.
2. Chunks start and end in ascending order; the last one ends with the text.
3. Two neighbours share ``overlap`` tokens; the last two at least so many.
4. No chunk holds more than ``block`` tokens.

A boundary retreats by up to 15 % of the block to the end of a sentence, else of a word. A last chunk
with less than 25 % of new tokens moves back until it is full: three words make a poor vector.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sutra_tasks.engines.offsets import Offsets

__all__ = [
    "MOST_OVERLAP",
    "Chunker",
    "boundary",
    "character_spans",
    "is_word_start",
]

MOST_OVERLAP: Final = 0.85
"""The largest overlap, as a share of the block: beyond it a boundary that retreats would not advance."""

RETREAT: Final = 1 - MOST_OVERLAP
"""How far a boundary may retreat, as a share of the block."""

LEAST_NEW: Final = 0.25
"""The share of new tokens in a block below which the last chunk moves back."""

SENTENCE_ENDS: Final = frozenset(".!?…。！？｡؟।")  # noqa: RUF001 - of many scripts
CLOSING: Final = "\"')]}»”’」』）】"  # noqa: RUF001 - of many scripts
ANY_END: Final = re.compile(f"[{re.escape(''.join(SENTENCE_ENDS))}]|\n\\s*\n")
SEARCH_CHARS: Final = 16
"""Characters that are searched on either side of a cut: without a limit, some texts take minutes."""


@dataclass(frozen=True, slots=True)
class Chunker:
    """Cuts texts into chunks of up to ``block`` tokens that overlap by ``overlap`` tokens.

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
        """Return the chunks of a text as spans of its tokens; none of a text without tokens."""
        total = len(offsets)
        # A boundary retreats by half of a chunk's new tokens at most: a large overlap would otherwise
        # make very many chunks.
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


def character_spans(offsets: Offsets, spans: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Return the characters of each span of tokens: from the first to behind the last."""
    # A tokenizer may place a character behind the next token's: spans ascend all the same.
    starts = np.minimum.accumulate(offsets.starts[::-1])[::-1]
    ends = np.maximum.accumulate(offsets.ends)
    return tuple((int(starts[start]), int(ends[end - 1])) for start, end in spans)


def boundary(text: str, offsets: Offsets, least: int, most: int) -> int:
    """Return the last good place to cut, as a count of the tokens before it.

    Args:
        text: the text.
        offsets: of its tokens; more than ``most``.
        least: tokens before the cut, 1 or more.
        most: tokens before the cut.
    """
    word = 0
    befores = offsets.ends[least - 1 : most].tolist()
    afters = offsets.starts[least : most + 1].tolist()
    # One search for the end of any sentence saves the look at each token where there is none.
    sentences = ANY_END.search(text, max(0, min(befores) - 2 * SEARCH_CHARS), max(afters) + SEARCH_CHARS)
    for at in range(most, least - 1, -1):
        before, after = befores[at - least], afters[at - least]
        if after < before:
            continue  # both tokens are of one character
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
    """Return the white space around a cut, up to a limit, with the characters between the two tokens.

    A tokenizer may count a space to the token that follows, to none, or as a token of its own.
    """
    least, most = max(0, start - SEARCH_CHARS), end + SEARCH_CHARS
    while start > least and text[start - 1].isspace():
        start -= 1
    while end < most and text[end : end + 1].isspace():
        end += 1
    return slice(start, end)


def _ends_sentence(text: str, space: slice) -> bool:
    if text[space].count("\n") > 1:
        return True  # the end of a paragraph is one
    last = text[max(0, space.start - SEARCH_CHARS) : space.start].rstrip(CLOSING)[-1:]
    # A full stop with nothing behind it is a decimal point, or part of a name.
    return last in SENTENCE_ENDS and (space.start < space.stop or not last.isascii())


def _ends_word(text: str, space: slice) -> bool:
    # Characters that the tokenizer dropped count, too: a word goes on behind an accent that BERT strips.
    return not all(map(_is_of_word, text[max(0, space.start - 1) : space.stop + 1]))


def _is_of_word(character: str) -> bool:
    # Vowel signs of Indic scripts and combining accents are marks, which isalnum() leaves out.
    return character.isalnum() or unicodedata.category(character)[0] == "M"
