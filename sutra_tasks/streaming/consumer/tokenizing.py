"""What comes from a stream is parsed, cut into chunks and tokenised: it becomes rows for the engine."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from sutra_tasks import keys
from sutra_tasks.chunking.sizes import ChunkSizes, added_tokens
from sutra_tasks.engines.encoder import check_options, cut_to_window
from sutra_tasks.errors import InvalidTextError, SutraError
from sutra_tasks.streaming.chunker import Chunk, OverlapChunker, TextProgress
from sutra_tasks.streaming.consumer.items import StreamItem, text_letter
from sutra_tasks.streaming.entries import MOST_NAME_CHARS, StreamEntry

if TYPE_CHECKING:
    from sutra_tasks.engines.encoder import Encoder, TokenizedText
    from sutra_tasks.settings import Settings
    from sutra_tasks.streaming.delivered import OpenText, RawEntry

__all__ = ["StreamTokenizer"]

TAKE_PROBES: Final = 8
"""Largest probes of a text that are taken at once, so that no device keeps a whole book for long."""


class StreamTokenizer:
    """Turns entries and open texts into items with rows for one model; for one thread.

    Attributes:
        encoder: the engine with the model.
    """

    def __init__(self, encoder: Encoder, options: Settings) -> None:
        """Cut as ``options`` say, for the window of ``encoder``."""
        self.encoder, self._options = encoder, options
        self._chunkers: dict[str | None, tuple[OverlapChunker, int]] = {}
        self._chunker(None)  # a block that is too small for the model is an error now

    @property
    def first_need(self) -> int:
        """Characters from which on a new text may be cut."""
        return self._chunker(None)[0].probes()[0]

    @property
    def most_bytes(self) -> int:
        """Bytes of an open text that are taken at once."""
        return TAKE_PROBES * self._chunker(None)[0].most_chars

    def entry_item(self, stream: str, raw: RawEntry, taken_at: float, deliveries: int = 0) -> StreamItem:
        """Return an entry as an item without rows yet; one that cannot be embedded has an error.

        Args:
            stream: the stream.
            raw: the entry.
            taken_at: seconds of the monotonic clock.
            deliveries: how often it was delivered before.
        """
        entry_id, fields = raw
        name = entry_id.decode()
        item = StreamItem(
            stream=stream,
            taken_at=taken_at,
            arrived_ms=int(name.partition("-")[0]),
            source=name,
            prompt=None,
            entry=raw,
            deliveries=deliveries,
        )
        try:
            entry = StreamEntry.parse(fields, self._options.max_text_chars)
            item.source, item.prompt = str(entry.id or name), entry.prompt
            item.content = entry.text
            check_options(self.encoder.info, entry.prompt, None)
            if entry.key is not None:
                raise _refused_piece(stream, entry)
        except SutraError as error:
            item.source, item.error = _valid_id(fields) or name, error
        return item

    def text_item(self, stream: str, text: OpenText, taken_at: float) -> StreamItem:
        """Return an open text as an item without chunks yet."""
        return StreamItem(
            stream=stream,
            taken_at=taken_at,
            arrived_ms=text.arrived_ms,
            source=text.source,
            prompt=text.prompt,
            text=text,
        )

    def give_up(self, item: StreamItem, error: SutraError) -> None:
        """Have an open text's buffer become a dead letter unseen, and answer with ``error``."""
        assert item.text is not None
        self._skip(item, item.text, error)
        item.letter = text_letter(item, error)

    def tokenize(self, items: Sequence[StreamItem]) -> None:
        """Give items their rows: one if the text fits into a block, else one for each chunk.

        Of an open text, the chunks that are complete get rows. An item that has an error, or whose text
        cannot be read, has none.
        """
        by_prompt: dict[str | None, list[StreamItem]] = {}
        for item in items:
            if item.error is not None:
                continue
            if item.text is not None:
                self._cut(item, item.text)
            else:
                by_prompt.setdefault(item.prompt, []).append(item)
        for prompt, some in by_prompt.items():
            chunker, block = self._chunker(prompt)
            texts = self.encoder.tokenize([item.content for item in some], prompt)
            for item, text in zip(some, texts, strict=True):
                if text.tokens <= block:
                    item.chunks, item.rows = [_whole(item.content)], [text]
                else:
                    item.chunks, _ = chunker.chunks(item.content, TextProgress(), "end")
                    item.rows = self._rows([chunk.text for chunk in item.chunks], prompt)

    def _cut(self, item: StreamItem, text: OpenText) -> None:
        """Give an item the chunks that are complete in its open text, and their rows."""
        try:
            check_options(self.encoder.info, text.prompt, None)
            decoder = codecs.getincrementaldecoder("utf-8")()
            # The buffer may end within a character: where a piece ends, or where a long text was cut.
            content = decoder.decode(text.buffer, final=text.ending == "end")
        except SutraError as error:
            self._skip(item, text, error)
            return
        except UnicodeDecodeError as error:
            reason = f"the text is not UTF-8 at byte {error.start} behind what was embedded"
            self._skip(item, text, InvalidTextError(0, reason))
            return
        chunker, _ = self._chunker(text.prompt)
        chunks, left = chunker.chunks(content, text.progress, text.ending)
        done = content[: left.progress.position - text.progress.position]
        item.done_bytes, item.progress = len(done.encode()), left.progress
        item.need = len(text.buffer) - item.done_bytes + max(1, left.missing)
        ended = bool(chunks) and not chunks[-1].overlap_next
        item.text_after = "ended" if ended else "idle" if text.ending == "idle" else "open"
        item.chunks = chunks
        item.rows = self._rows([chunk.text for chunk in chunks], text.prompt)

    def _skip(self, item: StreamItem, text: OpenText, error: SutraError) -> None:
        """Have the buffer of an open text dropped, and ``error`` come in its place."""
        position = text.progress.position + len(text.buffer.decode(errors="replace"))
        item.error, item.done_bytes = error, len(text.buffer)
        item.progress = TextProgress(position, text.progress.number + 1, position)
        item.need = self.first_need
        item.text_after = "ended" if text.ending in ("end", "abandoned") else "open"

    def _chunker(self, prompt: str | None) -> tuple[OverlapChunker, int]:
        """Return the chunker for texts under a prompt, and the tokens of a block with prompt and all."""
        found = self._chunkers.get(prompt)
        if found is None:
            encoder = self.encoder
            sizes = ChunkSizes.of(encoder.info, self._options)
            chunker = sizes.chunker(added_tokens(encoder, prompt))
            found = self._chunkers[prompt] = (
                OverlapChunker(
                    chunker.block,
                    chunker.overlap,
                    lambda text: encoder.offsets(encoder.tokenize([text], "")[0]),
                ),
                sizes.block,
            )
        return found

    def _rows(self, texts: list[str], prompt: str | None) -> list[TokenizedText]:
        rows = self.encoder.tokenize(texts, prompt) if texts else []
        # A chunk may have more tokens alone than within its text.
        return [cut_to_window(self.encoder, row) for row in rows]


def _refused_piece(stream: str, entry: StreamEntry) -> InvalidTextError:
    """Return why a piece did not go to its text."""
    if entry.seq is not None:
        reason = f"piece {entry.seq} of a text came without those before it; number them from 0"
    else:
        damaged = [keys.stream(stream, f"{part}:{entry.key}") for part in ("text", "pieces")]
        reason = f"the state of its text is damaged: delete {' and '.join(damaged)}"
    return InvalidTextError(0, reason)


def _whole(content: str) -> Chunk:
    return Chunk(content, 0, 0, len(content), overlap_previous=False, overlap_next=False)


def _valid_id(fields: Sequence[bytes]) -> str | None:
    """Return the id that an entry gives itself, if it can be one, whatever else is wrong with it."""
    found = dict(zip(fields[::2], fields[1::2], strict=False)).get(b"id", b"")
    with suppress(UnicodeDecodeError):
        name = found.decode()
        return name if 0 < len(name) <= MOST_NAME_CHARS else None
    return None
