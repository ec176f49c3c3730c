"""Entries and texts on their way through one device: cut into chunks, tokenised, answered."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from sutra_tasks.documents.sizes import ChunkSizes, added_tokens
from sutra_tasks.engines.encoder import check_options, cut_to_window
from sutra_tasks.errors import InvalidTextError, SutraError
from sutra_tasks.streaming.chunker import Chunk, OverlapChunker, Progress
from sutra_tasks.streaming.entries import MOST_NAME_CHARS, StreamEntry
from sutra_tasks.streaming.responses import VERSION, EmbeddedChunk, error_fields

if TYPE_CHECKING:
    from sutra_tasks.engines.encoder import Encoder, TokenizedText
    from sutra_tasks.settings import Settings
    from sutra_tasks.streaming.store import OpenText, RawEntry
    from sutra_tasks.vectors import Floats

__all__ = ["Cutter", "Unit", "response_fields"]

TAKE_PROBES: Final = 8
"""Largest probes of a text that are looked at in one go, so that nobody holds a whole book for long."""


@dataclass(slots=True, eq=False, kw_only=True)
class Unit:
    """What is committed in one step: an entry, or some chunks of a text that is being written.

    ``chunks`` and ``rows`` belong together; both are empty until an entry is tokenised, and of a text
    from which nothing could be cut yet. ``error`` says why there will be no vectors.
    """

    stream: str
    taken_at: float
    arrived_ms: int
    source: str
    prompt: str | None
    entry: RawEntry | None = None
    words: str = ""
    text: OpenText | None = None
    done_bytes: int = 0
    progress: Progress = field(default_factory=Progress)
    need: int = 0
    how: str = "last"
    chunks: list[Chunk] = field(default_factory=list)
    rows: list[TokenizedText] = field(default_factory=list)
    error: SutraError | None = None
    deliveries: int = 0

    def embedded(self) -> list[EmbeddedChunk]:
        """Return what each row is of."""
        key = None if self.text is None else self.text.key.decode(errors="replace")
        name = self.source if key is None else f"{key}@{self.source}"
        whole = self.text is None and len(self.chunks) == 1
        return [
            EmbeddedChunk(
                name if whole else f"{name}#{chunk.number}",
                self.source,
                key,
                chunk.number,
                chunk.start,
                chunk.end,
                chunk.overlap_previous,
                chunk.overlap_next,
                chunk.flushed,
                self.arrived_ms,
            )
            for chunk in self.chunks
        ]

    def concerned(self) -> list[str]:
        """Return the ids that an error names."""
        return [chunk.id for chunk in self.embedded()] or [self.source]


class Cutter:
    """Turns what comes from a stream into rows for the engine; for one thread."""

    def __init__(self, encoder: Encoder, options: Settings) -> None:
        self.encoder, self._options = encoder, options
        self._chunkers: dict[str | None, tuple[OverlapChunker, int]] = {}
        self.chunker_of(None)

    @property
    def first_need(self) -> int:
        """Characters from which on a text may be cut."""
        return self.chunker_of(None).probes()[0]

    @property
    def most_bytes(self) -> int:
        """Bytes of a text that are looked at in one go."""
        return TAKE_PROBES * self.chunker_of(None).most_chars

    def of_entry(self, stream: str, raw: RawEntry, taken_at: float, deliveries: int = 0) -> Unit:
        """Return an entry as a unit; one that cannot be embedded has an error."""
        entry_id, fields = raw
        name = entry_id.decode()
        unit = Unit(
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
            unit.source, unit.prompt, unit.words = entry.id or name, entry.prompt, entry.text
            check_options(self.encoder.info, entry.prompt, None)
            if entry.key is not None:
                raise InvalidTextError(
                    0, f"piece {entry.seq} of a text came without those before it; number them from 0"
                )
        except SutraError as error:
            unit.source, unit.error = _own_id(fields) or name, error
        return unit

    def of_text(self, stream: str, text: OpenText, taken_at: float) -> Unit:
        """Return the chunks that can be cut off a text now."""
        unit = self._unit_of(stream, text, taken_at)
        try:
            check_options(self.encoder.info, text.prompt, None)
            decoder = codecs.getincrementaldecoder("utf-8")()
            # Pieces may be split within a character; so is what a long text is looked at in.
            words = decoder.decode(text.buffer, final=text.ending == "end")
        except SutraError as error:
            return self._without(unit, error)
        except UnicodeDecodeError as error:
            reason = f"the text is not UTF-8 at byte {error.start} behind what was embedded"
            return self._without(unit, InvalidTextError(0, reason))
        chunks, left = self.chunker_of(text.prompt).chunks(words, text.progress, text.ending)
        done = words[: left.progress.position - text.progress.position]
        unit.done_bytes, unit.progress = len(done.encode()), left.progress
        unit.need = len(text.buffer) - unit.done_bytes + max(1, left.missing)
        ended = bool(chunks) and not chunks[-1].overlap_next
        unit.how = "last" if ended else "idle" if text.ending == "idle" else "more"
        unit.chunks = chunks
        unit.rows = self._rows([chunk.text for chunk in chunks], text.prompt)
        return unit

    def given_up(self, stream: str, text: OpenText, taken_at: float, error: SutraError) -> Unit:
        """Return a text without what there is of it; nothing looks at that any more."""
        return self._without(self._unit_of(stream, text, taken_at), error)

    @staticmethod
    def _unit_of(stream: str, text: OpenText, taken_at: float) -> Unit:
        return Unit(
            stream=stream,
            taken_at=taken_at,
            arrived_ms=text.arrived_ms,
            source=text.source,
            prompt=text.prompt,
            text=text,
        )

    def _without(self, unit: Unit, error: SutraError) -> Unit:
        """Return a text's unit that gives up what there is of it, and goes on behind it."""
        text = unit.text
        assert text is not None
        position = text.progress.position + len(text.buffer.decode(errors="replace"))
        unit.error, unit.done_bytes, unit.chunks, unit.rows = error, len(text.buffer), [], []
        unit.progress = Progress(position, text.progress.number + 1, position)
        unit.need = self.first_need
        unit.how = "last" if text.ending in ("end", "abandoned") else "more"
        return unit

    def tokenize(self, units: Sequence[Unit]) -> None:
        """Give entries their rows: a text that fits is one, others are cut."""
        by_prompt: dict[str | None, list[Unit]] = {}
        for unit in units:
            if unit.text is None and unit.error is None:
                by_prompt.setdefault(unit.prompt, []).append(unit)
        for prompt, some in by_prompt.items():
            chunker, block = self._chunker(prompt)
            texts = self.encoder.tokenize([unit.words for unit in some], prompt)
            for unit, text in zip(some, texts, strict=True):
                if text.tokens <= block:
                    unit.chunks = [
                        Chunk(
                            unit.words, 0, 0, len(unit.words), overlap_previous=False, overlap_next=False
                        )
                    ]
                    unit.rows = [text]
                else:
                    unit.chunks, _ = chunker.chunks(unit.words, Progress(), "end")
                    unit.rows = self._rows([chunk.text for chunk in unit.chunks], prompt)

    def chunker_of(self, prompt: str | None) -> OverlapChunker:
        """Return what cuts texts under a prompt."""
        return self._chunker(prompt)[0]

    def _chunker(self, prompt: str | None) -> tuple[OverlapChunker, int]:
        found = self._chunkers.get(prompt)
        if found is None:
            encoder = self.encoder
            sizes = ChunkSizes.of(encoder.info, self._options)
            chunker = sizes.chunker(added_tokens(encoder, prompt))
            found = self._chunkers[prompt] = (
                OverlapChunker(
                    chunker.block,
                    chunker.overlap,
                    lambda text: encoder.offsets(encoder.tokenize([text], None)[0]),
                ),
                sizes.block,
            )
        return found

    def _rows(self, texts: list[str], prompt: str | None) -> list[TokenizedText]:
        rows = self.encoder.tokenize(texts, prompt) if texts else []
        # A chunk may have more tokens by itself than within its text.
        return [cut_to_window(self.encoder, row) for row in rows]


def _own_id(fields: Sequence[bytes]) -> str | None:
    """Return the id that an entry gives itself, if it can be one, whatever else is wrong with it."""
    found = dict(zip(fields[::2], fields[1::2], strict=False)).get(b"id", b"")
    with suppress(UnicodeDecodeError):
        name = found.decode()
        return name if 0 < len(name) <= MOST_NAME_CHARS else None
    return None


def response_fields(*, space: str, model: str, device: str, width: int, latency_ms: float) -> list[Any]:
    """Return names and values of a response, without its chunks and vectors."""
    return [
        "v", VERSION, "kind", "response", "space", space, "model", model, "device", device,
        "width", width, "latency_ms", f"{latency_ms:.3f}",
    ]  # fmt: skip


def chunk_fields(unit: Unit, rows: Floats) -> list[Any]:
    """Return names and values of a unit's chunks and vectors, as they stand in a response."""
    chunks = ",".join(chunk.to_json() for chunk in unit.embedded())
    return ["chunks", f"[{chunks}]", "vectors", rows.tobytes()]


def error_of(unit: Unit) -> list[str]:
    """Return names and values of a unit's error."""
    assert unit.error is not None
    return error_fields(unit.concerned(), unit.error)
