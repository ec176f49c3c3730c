"""Chunks of a text that arrives in pieces: however it is split, they are the same.

Pure, but for the tokenizer that is handed in. A chunk is a stretch of characters of up to
``chunk_size`` tokens; the next one begins ``overlap`` tokens before its end. Where a chunk ends follows
from a stretch of the text whose length is fixed beforehand (one of :meth:`OverlapChunker.probes`,
counted from the chunk's start), and it ends once that stretch has arrived, or the text has ended. So
the pieces do not matter, with any tokenizer, and no more than the largest probe is ever kept.

The laws, which the tests hold:

1. Chunks cover every character; each begins at or before the end of the one before, and ends after it.
   Only the last one may end with it, where a text ends just where a chunk had, and be empty.
2. ``overlap_next`` is false on the last chunk of a text only, and every text that ends has one.
3. A chunk holds ``chunk_size`` tokens at most, by itself, as a reader would count them, or is a single
   character that has more.
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
"""Characters a token: of dense scripts, and of what is mostly white space."""
GROWTH: Final = 1.25
"""From probe to probe: a chunk waits for a quarter more than it holds, and is tokenised a few times."""
MARGIN: Final = 8
"""Tokens behind a cut that must be there: the last ones of a stretch depend on what follows."""
RETREAT: Final = 1 - MOST_OVERLAP


@dataclass(frozen=True, slots=True, repr=False)
class Chunk:
    """One chunk: the characters of its text from ``start`` to before ``end``.

    Attributes:
        text: those characters.
        number: chunks of the text before it.
        start: its first character.
        end: behind its last character.
        overlap_previous: whether it begins before the end of the chunk before.
        overlap_next: whether another one follows.
        flushed: ``"idle"`` where the text stood still and this is what there was; else None.
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
    """How far a text is cut: what has to be kept beside the characters from ``position`` on.

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
    """What is left of a text after its chunks: ``missing`` characters, at least, until the next."""

    progress: TextProgress
    missing: int


@dataclass(frozen=True, slots=True)
class _Cut:
    """Where a chunk ends and the next begins, from its start; whether it holds all that was left."""

    end: int
    resume: int
    is_rest: bool


@dataclass(frozen=True, slots=True)
class OverlapChunker:
    """Cuts into chunks of ``chunk_size`` tokens that overlap by ``overlap`` or a little more.

    Attributes:
        chunk_size: tokens of a chunk, special tokens and prompt not counted.
        overlap: tokens two neighbours share; the start of a word is looked for before them.
        offsets: returns where the tokens of a text stand in it; special ones left out.

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
        """Characters that are kept of a text at most, until a chunk is cut."""
        return self.probes()[-1]

    def probes(self) -> list[int]:
        """Return the lengths, in characters, at which a chunk's end is looked for."""
        found = [max(MARGIN, FIRST_PROBE * self.chunk_size)]
        while found[-1] < LARGEST_PROBE * self.chunk_size:
            found.append(int(GROWTH * found[-1]) + 1)
        return found

    def chunks(
        self, text: str, progress: TextProgress, ending: Ending | None = None
    ) -> tuple[list[Chunk], Unfinished]:
        """Return the chunks that are certain, and what is left.

        Args:
            text: the characters from ``progress.position`` on that have arrived.
            progress: how far the text was before.
            ending: ``"end"``: no more comes; ``"abandoned"``: it is given up for that; ``"idle"``: what
                there is becomes a chunk, and the text may go on. None: more may come.
        """
        found: list[Chunk] = []
        begin, most = progress.position, self.most_chars
        while True:
            at = progress.position - begin
            rest = text[at : at + most]  # not all of it, each time: a text may be a library
            old = progress.covered - progress.position  # characters of it that are in a chunk already
            cut = self._cut(rest, old, ended=ending is not None)
            if isinstance(cut, int):
                return found, Unfinished(progress, cut)
            if cut.is_rest and ending == "idle" and len(rest) == old:
                return found, Unfinished(progress, self._missing(old))
            if cut.end == old and not cut.is_rest:  # the overlap leaves no room: the chunk begins behind
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
        """Return how many characters must follow ``kept`` ones that are in a chunk already."""
        return next(length for length in self.probes() if length > kept) - kept

    def _cut(self, text: str, old: int, *, ended: bool) -> _Cut | int:
        """Return where the chunk at the start of ``text`` ends; else how many characters it lacks.

        Args:
            text: what there is from the chunk's start on.
            old: its first characters that the chunk before holds: it must end behind them.
            ended: that is all.
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
        """Return the cut within a stretch; all of it, if it has few enough tokens.

        The end is ``old`` where not one character more has room.
        """
        # A tokenizer may name a character later than the next token's: cuts still go forward.
        starts = np.minimum.accumulate(offsets.starts[::-1])[::-1]
        if len(starts) <= self.chunk_size:
            # A few very long words, or white space: kept, they would be most of the next chunk as well.
            resume = self._resume(text, starts, len(starts), len(text)) if ended else len(text)
            return _Cut(len(text), resume, is_rest=ended)
        least = max(1, int(np.searchsorted(starts, old, side="right")))
        stop = self.chunk_size
        if least <= stop:
            retreat = min(int(RETREAT * self.chunk_size), (self.chunk_size - self.overlap) // 2)
            stop = boundary(text, offsets, max(least, stop - retreat), stop)
        # By itself a part of a word may have more tokens than within it.
        while stop >= least and len(self.offsets(text[: starts[stop]])) > self.chunk_size:
            stop -= 1
        if stop < least:
            end = old or 1
            return _Cut(end, end, is_rest=ended and not old and len(text) == 1)
        end = int(starts[stop])
        return _Cut(end, self._resume(text, starts, stop, end), is_rest=False)

    def _resume(self, text: str, starts: Integers, stop: int, end: int) -> int:
        """Return where the next chunk begins: ``overlap`` tokens before, at a word if it can."""
        if not self.overlap or not len(starts):
            return end
        first = max(0, stop - self.overlap)
        least = max(0, first - (self.chunk_size - self.overlap) // 4)
        words = (at for at in range(first, least - 1, -1) if is_word_start(text, int(starts[at])))
        return int(starts[next(words, first)])
