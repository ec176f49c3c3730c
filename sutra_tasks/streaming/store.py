"""The entries and open texts of a stream, as device workers take them and give answers to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import redis

from sutra_tasks import keys, lua
from sutra_tasks.streaming.chunker import TextProgress
from sutra_tasks.streaming.delivered import (
    ClaimedEntries,
    CommitResult,
    OpenText,
    ReadEntries,
    TakenTexts,
)
from sutra_tasks.streaming.entries import MOST_NAME_CHARS, is_stream

if TYPE_CHECKING:
    from sutra_tasks.streaming.delivered import RawEntry, TextAfter

__all__ = ["StreamStore"]

MOST_NAME_BYTES: Final = 4 * MOST_NAME_CHARS
MOST_BUFFERED_BYTES: Final = 16_000_000
"""Bytes of a stream's open texts from which on its entries are not read."""
MOST_CLAIMED: Final = 64

GROUP: Final = keys.DEVICES_GROUP
READ: Final = lua.script("streaming/lua/read", GROUP=GROUP, MOST_NAME_BYTES=MOST_NAME_BYTES)
TAKE_TEXTS: Final = lua.script("streaming/lua/take_texts")
COMMIT: Final = lua.script("streaming/lua/commit", GROUP=GROUP)
COMMIT_TEXT: Final = lua.script("streaming/lua/commit_text")
CLAIM: Final = lua.script("streaming/lua/claim", GROUP=GROUP, MOST_CLAIMED=MOST_CLAIMED)
REFRESH: Final = lua.script("streaming/lua/refresh", GROUP=GROUP)
REFRESH_TEXTS: Final = lua.script("streaming/lua/refresh_texts")
REQUEUE: Final = lua.script("streaming/lua/requeue", GROUP=GROUP)
REQUEUE_TEXTS: Final = lua.script("streaming/lua/requeue_texts")
DEAD_LETTER: Final = lua.script("streaming/lua/dead_letter", GROUP=GROUP)


class StreamStore:
    """Entries and open texts on the server; safe to use from many threads.

    Every method raises :class:`redis.RedisError` if the server does not do it.
    """

    def __init__(self, client: redis.Redis, incarnation: str) -> None:
        """Use a client whose answers are bytes.

        Args:
            client: of the server with the queues.
            incarnation: of this worker: its name as a consumer.
        """
        self._client, self._incarnation = client, incarnation

    def streams(self) -> list[str]:
        """Return the names of all streams, in order; what cannot be a stream's name is left out."""
        found: Any = self._client.smembers(keys.streams())
        return sorted(filter(is_stream, (name.decode(errors="replace") for name in found)))

    def read(self, stream: str, most: int, *, first_need: int, most_unread: int) -> ReadEntries:
        """Take entries; pieces among them go to their texts.

        Args:
            stream: the stream.
            most: entries to take at most.
            first_need: bytes from which on a new text may be taken.
            most_unread: responses from which on nothing is taken, until readers acknowledge some.
        """
        last, entries, takeable_texts = READ(
            self._client,
            **_entries(stream),
            streams=keys.streams(),
            name=stream,
            responses=keys.stream(stream, "out"),
            texts=keys.stream(stream, "texts"),
            takeable=keys.stream(stream, "takeable"),
            buffered=keys.stream(stream, "buffered"),
            text=keys.stream(stream, "text:"),
            pieces=keys.stream(stream, "pieces:"),
            consumer=self._incarnation,
            most=most,
            most_buffered=MOST_BUFFERED_BYTES,
            most_unread=most_unread,
            first_need=first_need,
        )
        return ReadEntries(_raw_entries(entries), takeable_texts, last or None)

    def await_entries(self, behind: Mapping[str, bytes], timeout_s: float) -> bool:
        """Wait until a stream has an entry behind the given id, for ``timeout_s`` at most.

        Returns:
            False, at once, if one of the streams cannot be waited for: it was closed or damaged.
        """
        ids: dict[Any, Any] = {keys.stream(stream, "in"): last for stream, last in behind.items()}
        try:
            self._client.xread(ids, count=1, block=max(1, int(1000 * timeout_s)))
        except redis.ResponseError:
            return False
        return True

    def take_texts(self, stream: str, most: int, *, lease_s: float, most_bytes: int) -> TakenTexts:
        """Take texts that have grown enough, ended, or are to be flushed.

        Args:
            stream: the stream.
            most: texts to take at most.
            lease_s: seconds after which another device may take them, unless they are refreshed.
            most_bytes: bytes of each text at most.
        """
        taken, damaged = TAKE_TEXTS(
            self._client,
            takeable=keys.stream(stream, "takeable"),
            text=keys.stream(stream, "text:"),
            pieces=keys.stream(stream, "pieces:"),
            most=most,
            lease_ms=int(1000 * lease_s),
            most_bytes=most_bytes,
        )
        texts = [
            OpenText(
                key, token, attempts, ending.decode() or None, buffer, source.decode(errors="replace"),
                prompt.decode(errors="replace") or None, TextProgress(*map(int, progress)), int(at),
                entry.decode(),
            )
            for key, token, attempts, ending, buffer, source, prompt, entry, *progress, at in taken
        ]  # fmt: skip
        reasons = {key.decode(errors="replace"): why.decode(errors="replace") for key, why in damaged}
        return TakenTexts(texts, reasons)

    def commit(
        self, stream: str, header: Sequence[Any], entries: Iterable[tuple[bytes, str, bytes]]
    ) -> CommitResult:
        """Write one response and remove its entries, in one step.

        Args:
            stream: the stream.
            header: names and values of the response, without chunks and vectors; or those of an error.
            entries: of each its id, the JSON of its chunks, and their rows; of an error the latter are
                empty. Entries that another device committed meanwhile are left out.
        """
        ids, chunks, vectors = zip(*entries, strict=True)
        found = COMMIT(
            self._client,
            **_entries(stream),
            responses=keys.stream(stream, "out"),
            header=header,
            ids=ids,
            chunks=chunks,
            vectors=vectors,
        )
        return _commit_result(found)

    def commit_text(
        self,
        stream: str,
        text: OpenText,
        *,
        done_bytes: int,
        progress: TextProgress,
        need: int,
        text_after: TextAfter,
        response: Sequence[Any],
        letter: Sequence[Any] = (),
    ) -> CommitResult:
        """Write the response for some chunks of a text, and store how far the text is, in one step.

        Args:
            stream: the stream.
            text: as it was taken.
            done_bytes: bytes of its buffer that are done.
            progress: how much of it is in chunks from now on.
            need: bytes from which on it may be taken again.
            text_after: what the text is afterwards.
            response: names and values, one after the other; empty: nothing is written.
            letter: names and values of the dead letter that the bytes become; empty: they become none.
        """
        found = COMMIT_TEXT(
            self._client,
            responses=keys.stream(stream, "out"),
            texts=keys.stream(stream, "texts"),
            takeable=keys.stream(stream, "takeable"),
            buffered=keys.stream(stream, "buffered"),
            text=_text_key(stream, text),
            pieces=keys.stream(stream, "pieces:").encode() + text.key,
            key=text.key,
            token=text.token,
            done_bytes=done_bytes,
            position=progress.position,
            number=progress.number,
            covered=progress.covered,
            need=need,
            text_after=text_after,
            response=response,
            dead_letters=keys.stream(stream, "dead"),
            letter=letter,
        )
        return _commit_result(found)

    def claim(self, stream: str, silent_s: float) -> ClaimedEntries:
        """Claim entries whose consumer has been silent: all that were requeued uncounted, else one."""
        deliveries, entries = CLAIM(
            self._client,
            **_entries(stream),
            consumer=self._incarnation,
            silent_ms=int(1000 * silent_s),
        )
        return ClaimedEntries(deliveries, _raw_entries(entries))

    def refresh(
        self, stream: str, entries: Sequence[bytes], texts: Sequence[OpenText], lease_s: float
    ) -> None:
        """Say that this consumer still works on entries, by their ids, and on texts."""
        if entries:
            REFRESH(self._client, **_entries(stream), consumer=self._incarnation, ids=entries)
        if texts:
            REFRESH_TEXTS(self._client, **_taken(stream, texts), lease_ms=int(1000 * lease_s))

    def requeue(
        self, stream: str, entries: Sequence[bytes], texts: Sequence[OpenText], deliveries: int
    ) -> None:
        """Requeue entries, by their ids, and texts: another device may have them at once.

        Args:
            stream: the stream.
            entries: count as delivered ``deliveries`` times.
            texts: this take of them is not counted.
            deliveries: of the entries.
        """
        if entries:
            REQUEUE(
                self._client,
                **_entries(stream),
                consumer=self._incarnation,
                deliveries=deliveries,
                ids=entries,
            )
        if texts:
            REQUEUE_TEXTS(self._client, **_taken(stream, texts))

    def dead_letter(
        self, stream: str, entry: RawEntry, reason: Sequence[Any], error: Sequence[str]
    ) -> None:
        """Make an entry a dead letter, and write an error for its reader.

        Args:
            stream: the stream.
            entry: the entry.
            reason: names and values that the dead letter has beside those of the entry.
            error: names and values of the error.
        """
        entry_id, fields = entry
        DEAD_LETTER(
            self._client,
            **_entries(stream),
            dead_letters=keys.stream(stream, "dead"),
            responses=keys.stream(stream, "out"),
            id=entry_id,
            letter=[*fields, *reason],
            answer=error,
        )

    def answers(self) -> bool:
        """Whether the server answers at all."""
        try:
            self._client.ping()
        except redis.RedisError:
            return False
        return True

    def mark_suspect(self, source: str) -> None:
        """Record that this process runs an entry or text alone, because workers died of it before."""
        self._client.set(keys.suspect(self._incarnation), f"stream {source}", ex=keys.FORGET_AFTER_S)

    def unmark_suspect(self) -> None:
        """Remove that record."""
        self._client.delete(keys.suspect(self._incarnation))


def _entries(stream: str) -> dict[str, str]:
    """Return the keys that :file:`open_stream.lua` chooses from."""
    return {"entries": keys.stream(stream, "in"), "closed_entries": keys.stream(stream, "closed")}


def _text_key(stream: str, text: OpenText) -> bytes:
    return keys.stream(stream, "text:").encode() + text.key


def _taken(stream: str, texts: Sequence[OpenText]) -> dict[str, Any]:
    """Return what scripts must know of texts that this device has taken."""
    return {
        "takeable": keys.stream(stream, "takeable"),
        "texts": [_text_key(stream, text) for text in texts],
        "names": [text.key for text in texts],
        "tokens": [text.token for text in texts],
    }


def _raw_entries(found: Any) -> list[RawEntry]:
    return [(entry_id, fields) for entry_id, fields in found]


def _commit_result(found: Any) -> CommitResult:
    seconds, micros, entries = found
    return CommitResult(1000 * int(seconds) + int(micros) / 1000, entries)
