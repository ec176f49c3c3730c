"""From the texts of a call to rows for the engine: whole, cut at the window, or in chunks."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sutra_tasks.documents.chunking import MOST_OVERLAP, Chunker, chunks_of
from sutra_tasks.documents.plan import Plan, PlannedText
from sutra_tasks.documents.weights import chunk_weights
from sutra_tasks.errors import ModelError

if TYPE_CHECKING:
    from sutra_tasks.client.call import Call
    from sutra_tasks.documents.weights import Spans
    from sutra_tasks.engines.encoder import Encoder, TokenizedText
    from sutra_tasks.engines.offsets import Offsets
    from sutra_tasks.settings import Settings

__all__ = ["Pass", "Planned", "Planner", "within"]

USUAL_BLOCK: Final = 512
PROBE: Final = "a"


@dataclass(frozen=True, slots=True, repr=False)
class Pass:
    """One pass of late chunking.

    Attributes:
        text: what the engine sees.
        spans: the tokens of each chunk in it, special tokens and prompt not counted.
        row: which of the call's rows is the first chunk's.
    """

    text: TokenizedText
    spans: list[tuple[int, int]]
    row: int


@dataclass(frozen=True, slots=True, repr=False)
class Planned:
    """What becomes of a call's texts: their rows in order, but for those that ``passes`` give."""

    plan: Plan
    rows: list[TokenizedText]
    passes: list[Pass]

    def places(self) -> list[int]:
        """Return which of the call's rows each of ``rows`` is."""
        late = {at for one in self.passes for at in range(one.row, one.row + len(one.spans))}
        return [at for at in range(self.plan.rows) if at not in late]

    def position_of(self, row: int) -> int:
        """Return the text to which one of ``rows`` belongs."""
        return self.plan.positions[self.places()[row]]


class Planner:
    """Plans calls for one engine; safe to use from many threads."""

    def __init__(self, encoder: Encoder, options: Settings) -> None:
        """Check the settings for long texts against the model.

        Raises:
            ModelError: threshold or block are over its window, the overlap is too large for the block
                (under one of its prompts perhaps), or it is none for late chunking.
        """
        card = encoder.card
        usual = min(USUAL_BLOCK, card.window)
        self._encoder, self._options = encoder, options
        self._threshold = options.sequence_threshold or (card.window if card.is_static else usual)
        self._block = options.block_size or usual
        for name, tokens in (
            ("SUTRA_SEQUENCE_THRESHOLD", self._threshold),
            ("SUTRA_BLOCK_SIZE", self._block),
        ):
            if tokens > card.window:
                raise ModelError(card.model, f"{name}={tokens} is over its window of {card.window}")
        if options.chunking == "late":
            encoder.check_pool()
            if self._block > MOST_OVERLAP * card.window:
                raise ModelError(
                    card.model,
                    f"SUTRA_CHUNKING=late needs blocks smaller than 85 % of its window of {card.window}",
                )
        for prompt in (None, *card.prompts):
            (probe,) = encoder.tokenize([PROBE], prompt)
            room = self._block - (probe.tokens - len(encoder.offsets(probe)))
            try:
                Chunker(room, options.overlap_tokens)
            except ValueError as error:
                where = f" under its prompt {prompt!r}" if prompt else ""
                raise ModelError(
                    card.model, f"{error}{where}. Change SUTRA_OVERLAP_TOKENS or SUTRA_BLOCK_SIZE"
                ) from None

    def plan(self, call: Call) -> Planned:
        """Return what becomes of a call's texts."""
        texts = self._encoder.tokenize(call.texts, call.prompt) if call.texts else []
        method = call.aggregation_method or self._options.aggregation_method
        texts_planned: list[PlannedText] = []
        rows: list[TokenizedText] = []
        passes: list[Pass] = []
        total = 0
        for words, text in zip(call.texts, texts, strict=True):
            one = PlannedText(text.tokens, ((0, len(words)),), (1.0,))
            if text.tokens <= (self._encoder.card.window if call.truncate else self._threshold):
                rows.append(text)
            elif call.truncate:
                one, row = self._cut(words, text)
                rows.append(row)
            else:
                offsets = self._encoder.offsets(text)
                spans = self._chunker(text, offsets).spans(words, offsets)
                if len(spans) <= 1:  # it fits a block, or is nothing beside its prompt
                    rows.append(text)
                else:
                    one = _planned(words, text.tokens, offsets, spans, self._weights(spans, method))
                    if self._options.chunking == "late":
                        passes += self._passes(words, text, offsets, spans, total)
                    else:
                        rows += self._encoder.windows(text, offsets, spans)
            texts_planned.append(one)
            total += len(one.spans)
        return Planned(Plan(tuple(texts_planned), method), rows, passes)

    def _cut(self, words: str, text: TokenizedText) -> tuple[PlannedText, TokenizedText]:
        offsets = self._encoder.offsets(text)
        spans = [(0, self._encoder.card.window - (text.tokens - len(offsets)))]
        (row,) = self._encoder.windows(text, offsets, spans)
        return _planned(words, row.tokens, offsets, spans, (1.0,), truncated=True), row

    def _chunker(self, text: TokenizedText, offsets: Offsets) -> Chunker:
        room = self._block - (text.tokens - len(offsets))
        # Behind a prompt's last characters a text may begin with a token less than the probe did.
        return Chunker(room, min(self._options.overlap_tokens, int(MOST_OVERLAP * room)))

    def _weights(self, spans: list[tuple[int, int]], method: str) -> tuple[float, ...]:
        exact = self._options.seed_exact
        return tuple(chunk_weights(spans, method, seed_exact=exact).tolist())

    def _passes(
        self,
        words: str,
        text: TokenizedText,
        offsets: Offsets,
        spans: list[tuple[int, int]],
        row: int,
    ) -> list[Pass]:
        """Return passes over windows that overlap by a block, so that each chunk is whole in one."""
        room = self._encoder.card.window - (text.tokens - len(offsets))
        windows = Chunker(room, min(self._block, int(MOST_OVERLAP * room))).spans(words, offsets)
        found = []
        for window, chunks in zip(windows, within(spans, windows), strict=True):
            (seen,) = self._encoder.windows(text, offsets, [window])
            if chunks:
                inside = [
                    (start - window[0], end - window[0])
                    for start, end in spans[chunks.start : chunks.stop]
                ]
                found.append(Pass(seen, inside, row + chunks.start))
        return found


def within(spans: Spans, windows: Spans) -> list[range]:
    """Return the chunks that each window is to give: of those it holds whole, the ones in its middle.

    Consecutive ones, each in exactly one window; ``windows`` overlap by the longest chunk at least.
    """

    def seen_around(chunk: tuple[int, int], window: tuple[int, int]) -> int:
        # Negative where it is not whole. Of those that hold a chunk, the window at an end of the text
        # reaches furthest beyond it there: the ends need no care.
        return min(chunk[0] - window[0], window[1] - chunk[1])

    owners = [
        max(range(len(windows)), key=lambda at: seen_around(chunk, windows[at])) for chunk in spans
    ]
    return [
        range(bisect_left(owners, window), bisect_right(owners, window))
        for window in range(len(windows))
    ]


def _planned(
    words: str,
    tokens: int,
    offsets: Offsets,
    spans: list[tuple[int, int]],
    weights: tuple[float, ...],
    *,
    truncated: bool = False,
) -> PlannedText:
    chunks = chunks_of(words, offsets, spans)
    characters = tuple((chunk.start_char, chunk.end_char) for chunk in chunks)
    return PlannedText(tokens, characters, weights, truncated)
