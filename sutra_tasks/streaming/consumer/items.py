"""Items: entries and stretches of open texts on their way through one device, and their answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sutra_tasks.streaming.chunker import Chunk, TextProgress
from sutra_tasks.streaming.responses import VERSION, EmbeddedChunk, error_fields, hash_of

if TYPE_CHECKING:
    from sutra_tasks.engines.encoder import Encoder, TokenizedText
    from sutra_tasks.errors import SutraError
    from sutra_tasks.streaming.delivered import OpenText, RawEntry, TextAfter
    from sutra_tasks.vectors import Floats

__all__ = [
    "StreamItem",
    "chunk_fields",
    "entry_answer",
    "entry_ids",
    "item_error_fields",
    "open_texts",
    "response_header",
    "text_letter",
]


@dataclass(slots=True, eq=False, kw_only=True)
class StreamItem:
    """An entry, or the next chunks of an open text; it is committed in one step.

    Attributes:
        stream: the stream.
        taken_at: when this device took it, seconds of the monotonic clock.
        arrived_ms: when it arrived at the server, milliseconds since 1970; of a text: its newest piece.
        source: the producer's id of the text, or the id of its (first) entry.
        prompt: one of the model's named prompts.
        entry: the entry; None for an open text.
        content: the text of the entry.
        text: the open text; None for an entry.
        done_bytes: bytes of the open text's buffer that are done once this is committed.
        progress: how much of the open text is in chunks then.
        need: bytes from which on the open text may be taken again.
        text_after: what the open text is then.
        chunks: empty until an entry is tokenised, or if an open text is too short for a chunk.
        rows: of each chunk, for the engine.
        error: why there are no vectors.
        letter: names and values of the dead letter that a stretch of an open text becomes.
        deliveries: how often the entry was delivered before.
    """

    stream: str
    taken_at: float
    arrived_ms: int
    source: str
    prompt: str | None
    entry: RawEntry | None = None
    content: str = ""
    text: OpenText | None = None
    done_bytes: int = 0
    progress: TextProgress = field(default_factory=TextProgress)
    need: int = 0
    text_after: TextAfter = "ended"
    chunks: list[Chunk] = field(default_factory=list)
    rows: list[TokenizedText] = field(default_factory=list)
    error: SutraError | None = None
    letter: Sequence[Any] = ()
    deliveries: int = 0

    def embedded(self) -> list[EmbeddedChunk]:
        """Return the description of each row."""
        key = None if self.text is None else self.text.key.decode(errors="replace")
        name = self.source if key is None else f"{key}@{self.source}"
        is_whole = self.text is None and len(self.chunks) == 1
        entry = self.entry[0].decode() if self.entry is not None else self.text and self.text.entry
        return [
            EmbeddedChunk(
                name if is_whole else f"{name}#{chunk.number}",
                self.source,
                key,
                chunk.number,
                chunk.start,
                chunk.end,
                chunk.overlap_previous,
                chunk.overlap_next,
                chunk.flushed,
                self.arrived_ms,
                entry or None,
                hash_of(chunk.text, self.prompt, chunk.start, chunk.end, chunk.overlap_next),
            )
            for chunk in self.chunks
        ]

    def error_ids(self) -> list[str]:
        """Return the ids that an error of this item names."""
        return [chunk.id for chunk in self.embedded()] or [self.source]


def response_header(encoder: Encoder, device_id: str, latency_s: float) -> list[Any]:
    """Return names and values of a response, without its chunks and vectors.

    Args:
        encoder: that computed it.
        device_id: of this device.
        latency_s: seconds from taking the entries to their vectors.
    """
    info = encoder.info
    return [
        "v", VERSION, "kind", "response", "space", info.space, "model", info.model, "device", device_id,
        "width", info.width, "latency_ms", f"{1000 * latency_s:.3f}",
    ]  # fmt: skip


def chunk_fields(item: StreamItem, rows: Floats) -> list[Any]:
    """Return names and values of an item's chunks and vectors, for a response of its own.

    Args:
        item: the item.
        rows: float32, little-endian, shape (chunks, width).
    """
    return ["chunks", f"[{_chunks_json(item)}]", "vectors", rows.tobytes()]


def entry_answer(item: StreamItem, rows: Floats) -> tuple[bytes, str, bytes]:
    """Return an entry's id, the JSON objects of its chunks, and its vectors, for a common response."""
    assert item.entry is not None
    return item.entry[0], _chunks_json(item), rows.tobytes()


def item_error_fields(item: StreamItem) -> list[str]:
    """Return names and values of the error of an item."""
    assert item.error is not None
    return error_fields(item.error_ids(), item.error)


def text_letter(item: StreamItem, error: SutraError) -> list[Any]:
    """Return names and values of the dead letter of an open text's chunks, or else of its buffer."""
    assert item.text is not None
    text, start = item.text, item.text.progress.position
    stretch = text.buffer
    if item.chunks:  # behind them there is text that is not lost
        stretch = text.buffer.decode(errors="ignore")[: item.chunks[-1].end - start].encode()
    return [
        "key", text.key, "source", text.source, "position", start, "text", stretch, "reason", str(error),
    ]  # fmt: skip


def entry_ids(items: Sequence[StreamItem]) -> list[bytes]:
    """Return the ids of the entries among the items."""
    return [item.entry[0] for item in items if item.entry is not None]


def open_texts(items: Sequence[StreamItem]) -> list[OpenText]:
    """Return the open texts among the items."""
    return [item.text for item in items if item.text is not None]


def _chunks_json(item: StreamItem) -> str:
    return ",".join(chunk.to_json() for chunk in item.embedded())
