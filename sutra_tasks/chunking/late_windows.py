"""Late chunking: windows that the engine sees in one pass each, and the chunks that each one gives."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sutra_tasks.chunking.chunker import MOST_OVERLAP, Chunker

if TYPE_CHECKING:
    from sutra_tasks.chunking.weights import Spans
    from sutra_tasks.engines.encoder import Encoder, TokenizedText
    from sutra_tasks.engines.offsets import Offsets

__all__ = ["LateWindow", "chunks_of_windows", "late_windows"]


@dataclass(frozen=True, slots=True, repr=False)
class LateWindow:
    """A window of a text, from whose pass the vectors of several chunks are pooled.

    Attributes:
        text: the window, as the engine takes it.
        spans: the tokens of each chunk in the window, special tokens and prompt not counted.
        first_row: the number of the first chunk among all rows of the call.
    """

    text: TokenizedText
    spans: list[tuple[int, int]]
    first_row: int

    @property
    def row_numbers(self) -> range:
        """The numbers of its chunks among all rows of the call."""
        return range(self.first_row, self.first_row + len(self.spans))


def late_windows(
    encoder: Encoder,
    text: str,
    tokenized: TokenizedText,
    offsets: Offsets,
    chunks: Spans,
    *,
    block: int,
    first_row: int,
) -> list[LateWindow]:
    """Return the windows of a text; they overlap by a block, so that each chunk is whole in one.

    Args:
        encoder: of the model.
        text: the text.
        tokenized: its tokens, as the engine takes them.
        offsets: of its tokens.
        chunks: its chunks as spans of tokens.
        block: tokens of the longest chunk at most.
        first_row: the number of its first chunk among all rows of the call.
    """
    most = encoder.info.window - (tokenized.tokens - len(offsets))
    windows = Chunker(most, min(block, int(MOST_OVERLAP * most))).spans(text, offsets)
    found = []
    for window, given in zip(windows, chunks_of_windows(chunks, windows), strict=True):
        if given:
            (seen,) = encoder.windows(tokenized, offsets, [window])
            inside = [
                (start - window[0], end - window[0]) for start, end in chunks[given.start : given.stop]
            ]
            found.append(LateWindow(seen, inside, first_row + given.start))
    return found


def chunks_of_windows(chunks: Spans, windows: Spans) -> list[range]:
    """Return the numbers of the chunks that each window gives.

    Of the windows that hold a chunk whole, the one gives it that shows most of its surroundings. The
    chunks of a window are consecutive, and each chunk is in exactly one range.

    Args:
        chunks: as spans of tokens.
        windows: likewise; they overlap by the longest chunk at least.
    """

    def seen_around(chunk: tuple[int, int], window: tuple[int, int]) -> int:
        # Negative where the chunk is not whole. At an end of the text no window shows more than the
        # first or last one, which reaches furthest beyond the chunk on the other side.
        return min(chunk[0] - window[0], window[1] - chunk[1])

    owners = [
        max(range(len(windows)), key=lambda at: seen_around(chunk, windows[at])) for chunk in chunks
    ]
    return [
        range(bisect_left(owners, window), bisect_right(owners, window))
        for window in range(len(windows))
    ]
