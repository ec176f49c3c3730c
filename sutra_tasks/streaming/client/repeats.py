"""Which chunks a reader drops because they are repeats. Pure.

A chunk is a repeat if the same entry gave it before: its response was delivered twice. It is one as well
if another entry gave the same text under the same id last: a producer sent the entry again. An id that
comes with another text is news, also if that text was there before the one in between.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sutra_tasks.streaming.responses import EmbeddedChunk, StreamingResponse

__all__ = ["Repeats"]


class Repeats:
    """The chunks that a caller was given of late, and those of them that it handled."""

    def __init__(self, remember: int) -> None:
        """Remember so many handled chunks, and as many names of texts."""
        self._handled, self._given = _Chunks(remember), _Chunks(sys.maxsize)
        self._responses: list[StreamingResponse] = []

    def without(self, response: StreamingResponse) -> StreamingResponse | None:
        """Return the chunks of a response that are news, and count them as given; None if none is."""
        new = [self._give(chunk, response.space) for chunk in response.chunks]
        self._responses.append(response)  # with its repeats: they are repeats of what comes later, too
        if all(new):
            return response
        return response.only(new) if any(new) else None

    def handled(self) -> None:
        """Count as handled what was given."""
        for response in self._responses:
            for chunk in response.chunks:
                self._handled.add(chunk, response.space)
        self.put_back()

    def put_back(self) -> None:
        """Forget what was given and not handled: it comes again."""
        self._responses = []
        self._given.clear()

    def _give(self, chunk: EmbeddedChunk, space: str) -> bool:
        """Return whether a chunk is news, and count it as given then."""
        # Of a name with news that was given, the newest text is there.
        newest = self._given if self._given.knows(chunk) else self._handled
        if newest.has(chunk, space) or self._handled.has_entry(chunk):
            return False
        self._given.add(chunk, space)
        return True


@dataclass(slots=True)
class _Text:
    """The newest text of one name: its entry, and what each of its chunks holds."""

    entry: str
    contents: dict[str, Hashable] = field(default_factory=dict)


class _Chunks:
    """The last chunks of some responses, and the newest text of each name among them."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._chunks: dict[tuple[str, str], None] = {}
        self._texts: dict[tuple[str | None, str], _Text] = {}

    def knows(self, chunk: EmbeddedChunk) -> bool:
        """Say whether there is a text of the chunk's name."""
        return (chunk.key, chunk.source) in self._texts

    def has_entry(self, chunk: EmbeddedChunk) -> bool:
        """Say whether there is this chunk of this entry."""
        return (chunk.id, _entry_of(chunk)) in self._chunks

    def has(self, chunk: EmbeddedChunk, space: str) -> bool:
        """Say whether there is this chunk, of the same entry or as the newest of its name."""
        if self.has_entry(chunk):
            return True
        if chunk.text_hash is None:  # an older release wrote it: its text cannot be compared
            return False
        text = self._texts.get((chunk.key, chunk.source))
        return text is not None and text.contents.get(chunk.id) == (space, chunk.text_hash)

    def add(self, chunk: EmbeddedChunk, space: str) -> None:
        if not self._most:
            return
        entry, name = _entry_of(chunk), (chunk.key, chunk.source)
        text = self._texts.get(name)
        if text is None or (text.entry != entry and not self.has(chunk, space)):
            self._texts.pop(name, None)  # the newest one stands last
            text = self._texts[name] = _Text(entry)
        if text.entry == entry:
            text.contents[chunk.id] = (space, chunk.text_hash)
        self._chunks[chunk.id, entry] = None
        _trim(self._chunks, self._most)
        _trim(self._texts, self._most)

    def clear(self) -> None:
        self._chunks, self._texts = {}, {}


def _entry_of(chunk: EmbeddedChunk) -> str:
    """Return what identifies the entry of a chunk: its id or, of an older release, when it arrived."""
    return chunk.entry or f"at {chunk.arrived_ms}"


def _trim(found: dict[Any, Any], most: int) -> None:
    while len(found) > most:
        del found[next(iter(found))]
