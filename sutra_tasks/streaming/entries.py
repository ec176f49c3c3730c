"""What stands in a stream: what producers add, and what readers get; in words: ``docs/streams.md``.

Pure: fields to values and back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from sutra_tasks.errors import (
    CorruptResultError,
    InvalidOptionError,
    InvalidTextError,
    TooLargeError,
    UnsupportedVersionError,
)

if TYPE_CHECKING:
    from sutra_tasks.vectors import Floats

__all__ = [
    "LOW_PRIORITY",
    "MOST_NAME_CHARS",
    "VERSION",
    "EmbeddedChunk",
    "StreamEntry",
    "StreamingError",
    "StreamingResponse",
    "check_stream",
    "parse_output",
]

VERSION: Final = 1
LOW_PRIORITY: Final = 6
"""From here on, as Celery counts them, an entry is refused first: 0 is the highest, 9 the lowest."""
MOST_NAME_CHARS: Final = 200
"""Of an id or a key."""
MOST_SEQ: Final = 2**53 - 1
"""Lua and JavaScript count exactly up to here."""

_written: Final = json.JSONEncoder(separators=(",", ":")).encode
"""Made once: json.dumps makes an encoder for each value."""
_STREAM: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def check_stream(name: str) -> str:
    """Return ``name`` if a stream may have it.

    Raises:
        InvalidOptionError: it may not.
    """
    if not isinstance(name, str) or not _STREAM.fullmatch(name):
        raise InvalidOptionError(
            "stream", repr(name)[:80], "letters, digits, '-', '_' and '.', 64 at most"
        )
    return name


@dataclass(frozen=True, slots=True, repr=False)
class StreamEntry:
    """One text, or one piece of a text that is being written.

    Attributes:
        text: may be empty for a piece that only ends its text.
        id: names it in the output; the entry's id in the stream if not given.
        key: of the text to which this piece belongs; None: it is a text by itself.
        end: whether the text of ``key`` ends with it.
        seq: the piece's number in its text, from 0: one that is sent again is then dropped.
        priority: 0 to 9, as Celery's; from 6 on it is refused while pressure is severe.
        prompt: one of the model's named prompts; for pieces the first one's counts.
    """

    text: str
    id: str | None = None
    key: str | None = None
    end: bool = False
    seq: int | None = None
    priority: int = 0
    prompt: str | None = None

    def __repr__(self) -> str:
        return f"<StreamEntry {self.id or self.key or ''} {len(self.text)} characters>"

    def checked(self, most_chars: int) -> StreamEntry:
        """Return this entry if it can be embedded.

        Raises:
            InvalidInputError: naming what is wrong with it.
        """
        if not isinstance(self.text, str):
            raise InvalidTextError(0, f"a str is needed, not {type(self.text).__name__}")
        if len(self.text) > most_chars:
            raise TooLargeError(
                "characters in an entry", len(self.text), most_chars, "SUTRA_MAX_TEXT_CHARS"
            )
        for name in ("id", "key", "prompt"):
            value = getattr(self, name)
            if value is not None and (
                not isinstance(value, str) or not 0 < len(value) <= MOST_NAME_CHARS
            ):
                raise InvalidOptionError(name, repr(value)[:50], f"1 to {MOST_NAME_CHARS} characters")
        if type(self.priority) is not int or not 0 <= self.priority <= 9:  # noqa: PLR2004
            raise InvalidOptionError("priority", _shown(self.priority), "a whole number, 0 to 9")
        if self.seq is not None and (type(self.seq) is not int or not 0 <= self.seq <= MOST_SEQ):
            raise InvalidOptionError("seq", _shown(self.seq), f"a whole number, 0 to {MOST_SEQ}")
        if self.key is None and (self.end or self.seq is not None):
            raise InvalidOptionError("end" if self.end else "seq", "...", "a key beside it")
        for value in (self.text, self.id, self.key, self.prompt):
            _check_unicode(value or "")
        return self

    def fields(self) -> list[str]:
        """Return names and values, one after the other, for ``XADD``."""
        found = ["text", self.text]
        for name in ("id", "key", "prompt", "seq"):
            value = getattr(self, name)
            if value is not None:
                found += [name, str(value)]
        if self.end:
            found += ["end", "1"]
        if self.priority:
            found += ["priority", str(self.priority)]
        return found

    @classmethod
    def parse(cls, fields: Sequence[bytes], most_chars: int) -> StreamEntry:
        """Return what any producer wrote: names and values, one after the other.

        Raises:
            InvalidInputError: it is no entry, or cannot be embedded. No word of the text is in it.
        """
        found: dict[str, Any] = {}
        for at in range(0, len(fields) - 1, 2):
            name = fields[at].decode(errors="replace")
            if name in _FIELDS:
                try:
                    found[name] = _FIELDS[name](fields[at + 1])
                except UnicodeDecodeError as error:
                    raise InvalidTextError(0, f"{name} is not UTF-8 at byte {error.start}") from None
                except ValueError:
                    raise InvalidOptionError(name, "...", "a whole number") from None
        if "text" not in found:
            known = ", ".join(_FIELDS)
            raise InvalidTextError(0, f"an entry needs a field text; known are {known}")
        return cls(**found).checked(most_chars)


def _check_unicode(value: str) -> None:
    try:
        if not value.isascii():  # most are, and that is known of them
            value.encode()
    except UnicodeEncodeError as error:
        reason = f"a lone surrogate at character {error.start} is not valid Unicode"
        raise InvalidTextError(0, reason) from None


def _shown(value: object) -> str:
    try:
        return repr(value)[:50]
    except ValueError:  # Python does not write out very large numbers
        return "..."


def _optional(value: bytes) -> str | None:
    return value.decode() or None


def _whole(value: bytes) -> int:
    if not value.isdigit():  # int() takes "1_0" and " 1 " as well
        raise ValueError
    return int(value)


_FIELDS: Final[Mapping[str, Callable[[bytes], Any]]] = {
    "text": bytes.decode,
    "id": _optional,
    "key": _optional,
    "end": lambda value: value in (b"1", b"true"),
    "seq": lambda value: _whole(value) if value else None,
    "priority": lambda value: _whole(value or b"0"),
    "prompt": _optional,
}


@dataclass(frozen=True, slots=True, repr=False)
class EmbeddedChunk:
    """Where one vector of a response comes from.

    Attributes:
        id: names the chunk for good: repeats have the same id, and the same vector.
        source: the producer's id of the text, or the id of its (first) entry.
        key: the text's key; None for a text that came whole.
        number: chunks of the text before it.
        start: its first character in the text.
        end: behind its last character.
        overlap_previous: whether it begins before the end of the chunk before.
        overlap_next: whether another one follows; the last chunk of a text says no.
        flushed: ``"idle"`` where the text stood still, and this is what there was.
        arrived_ms: when the (last) entry it is of arrived, by the server's clock, since 1970.
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

    def __repr__(self) -> str:
        return f"<EmbeddedChunk {self.id} {self.start}:{self.end}>"

    def to_json(self) -> str:
        """Return the JSON object that stands in the output; what is usual is left out."""
        found: dict[str, Any] = {
            "id": self.id,
            "start": self.start,
            "end": self.end,
            "at": self.arrived_ms,
        }
        if self.source != self.id:
            found["source"] = self.source
        for name in ("key", "number", "overlap_previous", "overlap_next", "flushed"):
            if getattr(self, name):
                found[name] = getattr(self, name)
        return _written(found)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> EmbeddedChunk:
        """Return what :meth:`to_json` wrote."""
        return cls(
            id=value["id"],
            source=value.get("source", value["id"]),
            key=value.get("key"),
            number=value.get("number", 0),
            start=value["start"],
            end=value["end"],
            overlap_previous=value.get("overlap_previous", False),
            overlap_next=value.get("overlap_next", False),
            flushed=value.get("flushed"),
            arrived_ms=value["at"],
        )


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class StreamingResponse:
    """Vectors, as they leave a device: those of one batch that belong to one stream.

    Attributes:
        entry_id: of the response in the output stream; its first part is the time it was written, ms.
        chunks: what each row is of.
        embeddings: float32, shape (len(chunks), dim), of unit length.
        space: name of the embedding space. Vectors of two spaces must not be compared.
        model: the model's name as the fleet was given it.
        device: what computed them.
        latency_ms: from when the device took the entries until their vectors were there.
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
        """Return the chunks' ids."""
        return tuple(chunk.id for chunk in self.chunks)

    def only(self, wanted: Sequence[bool]) -> StreamingResponse:
        """Return this response without some of its chunks."""
        rows = np.flatnonzero(wanted)
        return StreamingResponse(
            self.entry_id, tuple(self.chunks[row] for row in rows), self.embeddings[rows],
            self.space, self.model, self.device, self.latency_ms,
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"<StreamingResponse {len(self.chunks)} chunks, {self.space}>"


@dataclass(frozen=True, slots=True)
class StreamingError:
    """Texts that have no vectors, and why.

    Attributes:
        entry_id: of the error in the output stream.
        chunk_ids: the producer's ids of what it concerns, or the ids of the entries.
        error: name of the exception, as in ``sutra_tasks.errors``.
        message: what is wrong, and what to do; never a word of a text.
    """

    entry_id: str
    chunk_ids: tuple[str, ...]
    error: str
    message: str


def error_fields(ids: Iterable[str], error: Exception) -> list[str]:
    """Return names and values of an error in the output."""
    listed = json.dumps(list(ids))
    return [
        "v", str(VERSION), "kind", "error", "ids", listed,
        "error", type(error).__name__, "message", str(error),
    ]  # fmt: skip


def parse_output(entry_id: bytes, fields: Mapping[bytes, bytes]) -> StreamingResponse | StreamingError:
    """Return what stands in an output stream.

    Raises:
        UnsupportedVersionError: another release wrote it.
        CorruptResultError: nothing of this package wrote it.
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
        # Copied: frombuffer is read-only, and callers normalise in place.
        rows = np.frombuffer(fields[b"vectors"], dtype="<f4").reshape(len(chunks), -1).copy()
        return StreamingResponse(
            name, chunks, rows, fields[b"space"].decode(), fields[b"model"].decode(),
            fields[b"device"].decode(), float(fields[b"latency_ms"]),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CorruptResultError(f"an entry of a stream: {error!r}"[:200]) from None
