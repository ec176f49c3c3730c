"""The output of a stream, as readers get it; ``docs/streams.md`` describes its fields. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from sutra_tasks.errors import CorruptResultError, UnsupportedVersionError

if TYPE_CHECKING:
    from sutra_tasks.vectors import Floats

__all__ = [
    "VERSION",
    "EmbeddedChunk",
    "StreamingError",
    "StreamingResponse",
    "error_fields",
    "hash_of",
    "parse_output",
    "readable_ids",
]

VERSION: Final = 1

_compact_json: Final = json.JSONEncoder(separators=(",", ":")).encode
"""Made once: json.dumps makes an encoder for each value."""


@dataclass(frozen=True, slots=True, repr=False)
class EmbeddedChunk:
    """The part of a text that one vector of a response stands for.

    Attributes:
        id: identifies the chunk; a repeated chunk has the same id and the same vector.
        source: the producer's id of the text, or the id of its (first) entry.
        key: the text's key; None for a text that came in one entry.
        number: position among the chunks of the text, from 0.
        start: position in the text of the chunk's first character.
        end: position in the text behind the chunk's last character.
        overlap_previous: whether the chunk begins before the end of the chunk before it.
        overlap_next: whether another chunk follows; False on the last chunk of a text.
        flushed: ``"idle"`` if the text stopped growing and was embedded as far as it went; else None.
        arrived_ms: when the chunk's (last) entry arrived, by the server's clock, in ms since 1970.
        entry: id of the text's (first) entry in the stream; an id may come again with another entry.
        text_hash: tells whether two chunks of one id have the same text, prompt and place; None, as for
            ``entry``, if an older release wrote the response.
    """

    id: str
    source: str
    key: str | None
    number: int
    start: int
    end: int
    overlap_previous: bool
    overlap_next: bool
    flushed: Literal["idle"] | None
    arrived_ms: int
    entry: str | None = None
    text_hash: str | None = None

    def __repr__(self) -> str:
        return f"<EmbeddedChunk {self.id} {self.start}:{self.end}>"

    def to_json(self) -> str:
        """Return the JSON object of the output, without the fields that have their defaults."""
        found: dict[str, Any] = {
            "id": self.id,
            "start": self.start,
            "end": self.end,
            "at": self.arrived_ms,
        }
        if self.source != self.id:
            found["source"] = self.source
        for name in ("key", "number", "overlap_previous", "overlap_next", "flushed", "entry"):
            if getattr(self, name):
                found[name] = getattr(self, name)
        if self.text_hash:
            found["hash"] = self.text_hash
        return _compact_json(found)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> EmbeddedChunk:
        """Read what :meth:`to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError: it was written by something else.
        """
        name = value["id"]
        names = (value.get("source", name), value.get("key"), value.get("entry"), value.get("hash"))
        numbers = (value.get("number", 0), value["start"], value["end"], value["at"])
        if not isinstance(name, str) or not all(isinstance(one, str | None) for one in names):
            raise TypeError("an id of a chunk is no string")
        if not all(isinstance(one, int) for one in numbers):
            raise TypeError("a position of a chunk is no whole number")
        return cls(
            id=name,
            source=value.get("source", name),
            key=value.get("key"),
            number=value.get("number", 0),
            start=value["start"],
            end=value["end"],
            overlap_previous=value.get("overlap_previous", False),
            overlap_next=value.get("overlap_next", False),
            flushed=value.get("flushed"),
            arrived_ms=value["at"],
            entry=value.get("entry"),
            text_hash=value.get("hash"),
        )


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class StreamingResponse:
    """The vectors of one batch that belong to one stream.

    Attributes:
        entry_id: id of the response in the output stream; its first part is when it was written, in ms.
        chunks: the chunk of each row of ``embeddings``.
        embeddings: float32, shape (len(chunks), dim), rows of unit length.
        space: name of the embedding space. Vectors of two spaces must not be compared.
        model: name of the model, as the fleet was given it.
        device: id of the device that computed the vectors.
        latency_ms: milliseconds from when the device took the oldest entry until the vectors were there.
    """

    entry_id: str
    chunks: tuple[EmbeddedChunk, ...]
    embeddings: Floats
    space: str
    model: str
    device: str
    latency_ms: float

    @property
    def chunk_ids(self) -> tuple[str, ...]:
        """Return the ids of the chunks, one a row."""
        return tuple(chunk.id for chunk in self.chunks)

    def only(self, kept: Sequence[bool]) -> StreamingResponse:
        """Return this response with only the chunks whose place in ``kept`` is True."""
        rows = np.flatnonzero(kept)
        return StreamingResponse(
            self.entry_id, tuple(self.chunks[row] for row in rows), self.embeddings[rows],
            self.space, self.model, self.device, self.latency_ms,
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"<StreamingResponse {len(self.chunks)} chunks, {self.space}>"


@dataclass(frozen=True, slots=True)
class StreamingError:
    """Texts that could not be embedded, and the reason.

    Attributes:
        entry_id: id of the error in the output stream.
        chunk_ids: the producer's ids of the texts or chunks, or else the ids of their entries.
        error: name of the exception's class, as in ``sutra_tasks.errors``.
        message: what is wrong, and what to do about it; it holds no word of a text.
    """

    entry_id: str
    chunk_ids: tuple[str, ...]
    error: str
    message: str


def hash_of(text: str, prompt: str | None, *place: object) -> str:
    """Return a hash by which a repeated chunk is told from another text under the same id.

    Args:
        text: of the chunk.
        prompt: one of the model's named prompts.
        *place: where the chunk is in its text.
    """
    said = "\0".join((text, prompt or "", *map(str, place)))
    return hashlib.blake2b(said.encode(), digest_size=8, usedforsecurity=False).hexdigest()


def error_fields(ids: Iterable[str], error: Exception) -> list[str]:
    """Return the fields of an error in the output: names and values in turn."""
    listed = json.dumps(list(ids))
    return [
        "v", str(VERSION), "kind", "error", "ids", listed,
        "error", type(error).__name__, "message", str(error),
    ]  # fmt: skip


def parse_output(entry_id: bytes, fields: Mapping[bytes, bytes]) -> StreamingResponse | StreamingError:
    """Read one entry of an output stream.

    Args:
        entry_id: its id in the stream.
        fields: its fields.

    Raises:
        UnsupportedVersionError: another release wrote it.
        CorruptResultError: it was not written by this package.
    """
    version = fields.get(b"v", b"").decode(errors="replace")
    if version != str(VERSION):
        raise UnsupportedVersionError("streaming response", version[:20], VERSION)
    try:
        name = entry_id.decode()
        if fields[b"kind"] == b"error":
            ids = tuple(map(str, json.loads(fields[b"ids"])))
            return StreamingError(name, ids, fields[b"error"].decode(), fields[b"message"].decode())
        chunks = tuple(map(EmbeddedChunk.from_json, json.loads(fields[b"chunks"])))
        # Copied because frombuffer is read-only, and callers normalise in place.
        width = len(fields[b"vectors"]) // 4 // len(chunks)
        rows = np.frombuffer(fields[b"vectors"], dtype="<f4").reshape(len(chunks), max(1, width)).copy()
        return StreamingResponse(
            name, chunks, rows, fields[b"space"].decode(), fields[b"model"].decode(),
            fields[b"device"].decode(), float(fields[b"latency_ms"]),
        )  # fmt: skip
    except UnicodeDecodeError as error:  # its words quote the field
        raise CorruptResultError(f"an entry of a stream: not UTF-8 at byte {error.start}") from None
    except (KeyError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise CorruptResultError(f"an entry of a stream: {error!r}"[:200]) from None


def readable_ids(fields: Mapping[bytes, bytes]) -> tuple[str, ...]:
    """Return the ids that an output entry names, as far as they can be read, whatever else is wrong."""
    found: list[Any] = []
    with suppress(KeyError, TypeError, ValueError, RecursionError):
        found += json.loads(fields[b"ids"])
    with suppress(KeyError, TypeError, ValueError, RecursionError):
        found += [chunk["id"] for chunk in json.loads(fields[b"chunks"])]
    return tuple(name for name in found if isinstance(name, str))
