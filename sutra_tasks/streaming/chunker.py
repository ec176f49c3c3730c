"""Chunks of a text that arrives in pieces: the same chunks, however the text is split into pieces.

Pure, except for the tokenizer that the caller passes. A chunk is a stretch of characters of up to
``chunk_size`` tokens; the next chunk begins ``overlap`` tokens before its end. The end of a chunk
follows from a probe: a stretch that begins with the chunk and has one of a few fixed lengths
(:meth:`OverlapChunker.probes`). A chunk is cut once its probe has arrived, or the text has ended. So the
chunks do not depend on the pieces, with any tokenizer, and no more than the largest probe is kept.

Three laws, which the tests hold:

1. Chunks cover every character. Each begins at or before the end of the chunk before it, and ends behind
   it; only the last chunk may end with it and be empty, if the text ends where the chunk before ended.
2. ``overlap_next`` is false on the last chunk of a text only, and every text that ends has a last chunk.
3. A chunk, tokenised alone, has ``chunk_size`` tokens at most, or is a single character with more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

from sutra_tasks.chunking.chunker import MOST_OVERLAP, boundary, is_word_start

if TYPE_CHECKING:
    from sutra_tasks.engines.offsets import Integers, Offsets

__all__ = ["Chunk", "Ending", "OverlapChunker", "TextProgress", "Unfinished"]

Ending = Literal["end", "idle", "abandoned"]

FIRST_PROBE: Final = 2
LARGEST_PROBE: Final = 32
"""Characters a token in the first and the largest probe: dense scripts have 2, white space has many."""
GROWTH: Final = 1.25
"""Ratio of two probes: a chunk waits for a quarter more than it holds, and is tokenised a few times."""
MARGIN: Final = 8
"""Tokens that a probe must have behind the cut: its last tokens depend on the text that follows."""
RETREAT: Final = 1 - MOST_OVERLAP
"""Share of a chunk that may be left out so that it ends at a sentence or a word."""


@dataclass(frozen=True, slots=True, repr=False)
class Chunk:
    """One chunk: the characters of its text from ``start`` to before ``end``.

    Attributes:
        text: those characters.
        number: chunks of the text before it.
        start: its first character.
        end: behind its last character.
        overlap_previous: whether it begins before the end of the chunk before.
        overlap_next: whether another chunk follows.
        flushed: ``"idle"`` if the text was embedded as it was because it had stopped growing; else None.
    """

    text: str
    number: int
    start: int
    end: int
    overlap_previous: bool
    overlap_next: bool
    flushed: Literal["idle"] | None = None

    def __repr__(self) -> str:
        return f"<Chunk {self.number} {self.start}:{self.end}>"


@dataclass(frozen=True, slots=True)
class TextProgress:
    """How much of a text is in chunks; kept together with the characters from ``position`` on.

    Attributes:
        position: where the next chunk begins, in characters.
        number: chunks so far.
        covered: behind the last character of the chunk before.
    """

    position: int = 0
    number: int = 0
    covered: int = 0


@dataclass(frozen=True, slots=True)
class Unfinished:
    """The rest of a text behind its chunks: the next chunk needs at least ``missing`` characters."""

    progress: TextProgress
    missing: int


@dataclass(frozen=True, slots=True)
class _Cut:
    """One cut, in characters from the start of its chunk.

    Attributes:
        end: where the chunk ends.
        resume: where the next chunk begins.
        is_rest: whether the chunk holds the whole rest of the text.
    """

    end: int
    resume: int
    is_rest: bool


@dataclass(frozen=True, slots=True)
class OverlapChunker:
    """Cuts into chunks of ``chunk_size`` tokens that overlap by ``overlap`` or a little more.

    Attributes:
        chunk_size: tokens of a chunk, special tokens and prompt not counted.
        overlap: tokens that two neighbours share, or a few more to begin at a word.
        offsets: returns where the tokens of a text stand in it, without special tokens.

    Raises:
        ValueError: the chunk is empty, or the overlap so large that it might never advance.
    """

    chunk_size: int
    overlap: int
    offsets: Callable[[str], Offsets]

    def __post_init__(self) -> None:
        if self.chunk_size < 1:
            raise ValueError(f"a chunk of {self.chunk_size} tokens holds no text")
        if not 0 <= self.overlap <= MOST_OVERLAP * self.chunk_size:
            raise ValueError(
                f"an overlap of {self.overlap} tokens must be 0 to "
                f"{int(MOST_OVERLAP * self.chunk_size)}: 85 % of a chunk of {self.chunk_size}"
            )

    @property
    def most_chars(self) -> int:
        """Characters that a chunk needs at most until it can be cut."""
        return self.probes()[-1]

    def probes(self) -> list[int]:
        """Return the lengths of the probes in characters, ascending."""
        found = [max(MARGIN, FIRST_PROBE * self.chunk_size)]
        while found[-1] < LARGEST_PROBE * self.chunk_size:
            found.append(int(GROWTH * found[-1]) + 1)
        return found

    def chunks(
        self, text: str, progress: TextProgress, ending: Ending | None = None
    ) -> tuple[list[Chunk], Unfinished]:
        """Return the chunks that no later piece can change, and the rest.

        Args:
            text: the characters from ``progress.position`` on that have arrived.
            progress: how much of the text is in chunks already.
            ending: ``"end"``: the text has ended; ``"abandoned"``: it ends here, its producer is gone;
                ``"idle"``: the rest becomes a chunk, and the text may go on; None: it may go on.
        """
        found: list[Chunk] = []
        begin, most = progress.position, self.most_chars
        while True:
            at = progress.position - begin
            rest = text[at : at + most]  # a part only: a text may be a library
            old = progress.covered - progress.position  # characters of the rest that are in a chunk
            cut = self._cut(rest, old, ended=ending is not None)
            if isinstance(cut, int):
                return found, Unfinished(progress, cut)
            if cut.is_rest and ending == "idle" and len(rest) == old:
                return found, Unfinished(progress, self._missing(old))
            if cut.end == old and not cut.is_rest:  # the overlap fills the chunk: leave it out
                progress = replace(progress, position=progress.covered)
                continue
            found.append(
                Chunk(
                    rest[: cut.end],
                    progress.number,
                    progress.position,
                    progress.position + cut.end,
                    overlap_previous=old > 0,
                    overlap_next=not cut.is_rest or ending == "idle",
                    flushed="idle" if cut.is_rest and ending != "end" else None,
                )
            )
            progress = TextProgress(
                progress.position + cut.resume, progress.number + 1, progress.position + cut.end
            )
            if cut.is_rest:
                return found, Unfinished(progress, self._missing(cut.end - cut.resume))

    def _missing(self, kept: int) -> int:
        """Return how many characters the next probe needs behind ``kept`` ones."""
        return next(length for length in self.probes() if length > kept) - kept

    def _cut(self, text: str, old: int, *, ended: bool) -> _Cut | int:
        """Return where the chunk at the start of ``text`` ends, or how many characters are missing.

        Args:
            text: the characters from the chunk's start on that have arrived.
            old: how many of the first ones are in the chunk before: this one must end behind them.
            ended: whether the text goes no further.
        """
        stretch, offsets = "", self.offsets("")
        for length in self.probes():
            if length <= old:
                continue
            if len(text) < length:
                if not ended:
                    return length - len(text)
                return self._within(text, self.offsets(text), old, ended=True)
            stretch = text[:length]
            offsets = self.offsets(stretch)
            if len(offsets) >= self.chunk_size + MARGIN:
                break
        return self._within(stretch, offsets, old, ended=False)

    def _within(self, text: str, offsets: Offsets, old: int, *, ended: bool) -> _Cut:
        """Return the cut within a stretch; its end if it has few enough tokens.

        The cut ends at ``old`` if the chunk cannot hold one character more.
        """
        # A tokenizer may name a character later than the next token's: cuts still go forward.
        starts = np.minimum.accumulate(offsets.starts[::-1])[::-1]
        if len(starts) <= self.chunk_size:
            # A few very long words, or white space: no overlap, it would be most of the next chunk.
            resume = self._resume(text, starts, len(starts), len(text)) if ended else len(text)
            return _Cut(len(text), resume, is_rest=ended)
        least = max(1, int(np.searchsorted(starts, old, side="right")))
        stop = self.chunk_size
        if least <= stop:
            retreat = min(int(RETREAT * self.chunk_size), (self.chunk_size - self.overlap) // 2)
            stop = boundary(text, offsets, max(least, stop - retreat), stop)
        # A part of a word may have more tokens alone than within the word.
        while stop >= least and len(self.offsets(text[: starts[stop]])) > self.chunk_size:
            stop -= 1
        if stop < least:
            end = old or 1
            return _Cut(end, end, is_rest=ended and not old and len(text) == 1)
        end = int(starts[stop])
        return _Cut(end, self._resume(text, starts, stop, end), is_rest=False)

    def _resume(self, text: str, starts: Integers, stop: int, end: int) -> int:
        """Return where the next chunk begins: ``overlap`` tokens before, at a word if possible."""
        if not self.overlap or not len(starts):
            return end
        first = max(0, stop - self.overlap)
        least = max(0, first - (self.chunk_size - self.overlap) // 4)
        words = (at for at in range(first, least - 1, -1) if is_word_start(text, int(starts[at])))
        return int(starts[next(words, first)])
