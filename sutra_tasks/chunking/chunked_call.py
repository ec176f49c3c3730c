"""A call's texts as rows for the engine: whole, cut at the model's window, or in chunks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sutra_tasks.chunking.answer import AnswerLayout, TextLayout
from sutra_tasks.chunking.chunker import character_spans
from sutra_tasks.chunking.late_windows import late_windows
from sutra_tasks.chunking.sizes import ChunkSizes
from sutra_tasks.chunking.weights import chunk_weights
from sutra_tasks.engines.encoder import kept_span

if TYPE_CHECKING:
    from sutra_tasks.chunking.late_windows import LateWindow
    from sutra_tasks.client.call import Call
    from sutra_tasks.engines.encoder import Encoder, TokenizedText
    from sutra_tasks.settings import Settings

    ChunkedText = tuple[TextLayout, list[TokenizedText], list[LateWindow]]
    """The rows of one text, as those of a call."""

__all__ = ["CallChunker", "ChunkedCall"]


@dataclass(frozen=True, slots=True, repr=False)
class ChunkedCall:
    """The rows of a call in order, and how their vectors become its answer.

    Attributes:
        layout: of all rows.
        rows: those that are computed one by one, in batches.
        late_windows: what gives the vectors of the other rows: late chunking.
    """

    layout: AnswerLayout
    rows: list[TokenizedText]
    late_windows: list[LateWindow]

    def row_numbers(self) -> list[int]:
        """Return the number of each of ``rows`` among all rows of the call."""
        late = {number for window in self.late_windows for number in window.row_numbers}
        return [number for number in range(self.layout.row_count) if number not in late]

    def position_of(self, row: int) -> int:
        """Return the position of the text to which one of ``rows`` belongs."""
        return self.layout.positions[self.row_numbers()[row]]


class CallChunker:
    """Turns calls into rows for one engine; safe to use from many threads."""

    def __init__(self, encoder: Encoder, options: Settings) -> None:
        """Check the settings for long texts against the model.

        Raises:
            ModelError: they do not fit it.
        """
        self._encoder, self._options = encoder, options
        self._sizes = ChunkSizes.of(encoder.info, options)
        self._late = options.chunking == "late"
        self._sizes.check(encoder, late=self._late)

    def chunk(self, call: Call) -> ChunkedCall:
        """Tokenise the texts of a call, cut those that are too long, and weigh their chunks."""
        method = call.aggregation_method or self._options.aggregation_method
        most_tokens = self._encoder.info.window if call.truncate else self._sizes.threshold
        tokenized_texts = self._encoder.tokenize(call.texts, call.prompt) if call.texts else []
        layouts: list[TextLayout] = []
        rows: list[TokenizedText] = []
        windows: list[LateWindow] = []
        row_count = 0
        for text, tokenized in zip(call.texts, tokenized_texts, strict=True):
            if tokenized.tokens <= most_tokens:
                found = _whole(text, tokenized)
            elif call.truncate:
                found = self._truncated(tokenized)
            else:
                found = self._chunks(text, tokenized, method, row_count)
            layouts.append(found[0])
            rows += found[1]
            windows += found[2]
            row_count += len(found[0].spans)
        return ChunkedCall(AnswerLayout(tuple(layouts), method), rows, windows)

    def _truncated(self, tokenized: TokenizedText) -> ChunkedText:
        offsets = self._encoder.offsets(tokenized)
        spans = [kept_span(self._encoder.info, tokenized.tokens, len(offsets))]
        (row,) = self._encoder.windows(tokenized, offsets, spans)
        characters = character_spans(offsets, spans)
        return TextLayout(row.tokens, characters, (1.0,), truncated=True), [row], []

    def _chunks(self, text: str, tokenized: TokenizedText, method: str, first_row: int) -> ChunkedText:
        encoder, sizes = self._encoder, self._sizes
        offsets = encoder.offsets(tokenized)
        spans = sizes.chunker(tokenized.tokens - len(offsets)).spans(text, offsets)
        if len(spans) <= 1:  # the text fits a block, or is empty beside its prompt
            return _whole(text, tokenized)
        weights = chunk_weights(spans, method, seed_exact=self._options.seed_exact)
        layout = TextLayout(tokenized.tokens, character_spans(offsets, spans), tuple(weights.tolist()))
        if not self._late:
            return layout, encoder.windows(tokenized, offsets, spans), []
        windows = late_windows(
            encoder, text, tokenized, offsets, spans, block=sizes.block, first_row=first_row
        )
        return layout, [], windows


def _whole(text: str, tokenized: TokenizedText) -> ChunkedText:
    return TextLayout(tokenized.tokens, ((0, len(text)),), (1.0,)), [tokenized], []
