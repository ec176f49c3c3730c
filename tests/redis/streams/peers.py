"""A stream on a real server as its devices see it, and the helpers that its tests share."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sutra_tasks import keys
from sutra_tasks.keys import DEVICES_GROUP
from sutra_tasks.streaming.backpressure import Level
from sutra_tasks.streaming.chunker import TextProgress
from sutra_tasks.streaming.store import StreamStore
from sutra_tasks.streaming.upkeep_store import StreamState, UpkeepStore

if TYPE_CHECKING:
    import redis

    from sutra_tasks.streaming.delivered import CommitResult, OpenText, RawEntry, TextAfter

S = "s"
IN, CLOSED, OUT, DEAD, TEXTS, TAKEABLE, BUFFERED, STATE = (
    keys.stream(S, part)
    for part in ("in", "closed", "out", "dead", "texts", "takeable", "buffered", "state")
)
RESPONSE = ["v", 1, "kind", "response"]
ERROR = ["v", "1", "kind", "error", "ids", '["a"]', "error", "EncodingError", "message", "no"]
FIRST_NEED = 8
AFTER: dict[str | None, TextAfter] = {
    None: "open",
    "idle": "idle",
    "end": "ended",
    "abandoned": "ended",
}


class Device(StreamStore, UpkeepStore):
    """Everything that a device does to its streams on the server."""


def add(client: redis.Redis, **fields: Any) -> bytes:
    """Add an entry as any client would; ``end`` is a name of a field as any other."""
    given: Any = fields
    entry_id: Any = client.xadd(IN, given)
    return bytes(entry_id)


def read(server: Device, most: int = 100, *, most_unread: int = 1000) -> list[RawEntry]:
    return list(server.read(S, most, first_need=FIRST_NEED, most_unread=most_unread).entries)


def take(
    server: Device, most: int = 100, *, lease_s: float = 60, most_bytes: int = 10**6
) -> list[OpenText]:
    return list(server.take_texts(S, most, lease_s=lease_s, most_bytes=most_bytes).texts)


def take_one(server: Device, **options: Any) -> OpenText:
    (text,) = take(server, **options)
    return text


def cut(
    server: Device,
    text: OpenText,
    done: int | None = None,
    *,
    text_after: TextAfter | None = None,
    need: int = 1,
    letter: Sequence[Any] = (),
) -> CommitResult:
    """Commit the first ``done`` bytes of a text as one chunk; all of it if nothing is said."""
    done = len(text.buffer) if done is None else done
    words = text.buffer[:done].decode()
    at = text.progress.position + len(words)
    if text_after is None:
        text_after = AFTER[text.ending]
    number = text.progress.number
    response = ["key", text.key, "source", text.source, "number", number, "text", words]
    progress = TextProgress(at, number + 1, at)
    return server.commit_text(
        S,
        text,
        done_bytes=done,
        progress=progress,
        need=need,
        text_after=text_after,
        response=response,
        letter=letter,
    )


def expire(client: redis.Redis) -> None:
    """Let the leases of all texts end."""
    named: Any = client.zrange(TAKEABLE, 0, -1)
    if named:
        client.zadd(TAKEABLE, dict.fromkeys(named, 0), xx=True)


def silence(client: redis.Redis, consumer: str, *entry_ids: bytes, stream: str = IN) -> None:
    """Let a consumer have been silent over entries for a minute."""
    client.xclaim(stream, DEVICES_GROUP, consumer, 0, list(entry_ids), idle=60_000, justid=True)


def pending(client: redis.Redis) -> dict[bytes, tuple[str, int]]:
    """Return who has which entry, and how often it was delivered."""
    found: Any = client.xpending_range(IN, DEVICES_GROUP, "-", "+", 1000)
    return {one["message_id"]: (one["consumer"].decode(), one["times_delivered"]) for one in found}


def written(client: redis.Redis, name: str = OUT) -> list[dict[bytes, bytes]]:
    """Return what stands in the output, or in another stream."""
    found: Any = client.xrange(name)
    return [fields for _, fields in found]


def texts_of(entries: Sequence[RawEntry]) -> list[bytes]:
    return [fields[fields.index(b"text") + 1] for _, fields in entries]


def whole_texts(client: redis.Redis) -> dict[bytes, bytes]:
    """Return what was written of each text, one chunk behind the other, by its source."""
    found: dict[bytes, bytes] = {}
    for fields in written(client):
        found[fields[b"source"]] = found.get(fields[b"source"], b"") + fields[b"text"]
    return found


def everything(client: redis.Redis, *servers: Device) -> None:
    """Let consumers read and commit in turn, by chance as much as they like, until nothing is left."""
    chance = random.Random(len(servers))
    while client.xlen(IN) or client.zcard(TAKEABLE):
        server = chance.choice(servers)
        assert read(server, chance.randint(1, 5)) == []
        for text in take(server, chance.randint(1, 3)):
            cut(server, text)


def grew(client: redis.Redis, s_ago: float, *named: str) -> None:
    """Let texts have grown last so many seconds ago."""
    now: Any = client.time()
    client.zadd(TEXTS, dict.fromkeys(named, 1000 * (now[0] - s_ago)), xx=True)


def backlog(client: redis.Redis) -> int:
    size: Any = client.xlen(IN if client.type(IN) == b"stream" else CLOSED)
    return int(size)


def close(client: redis.Redis, server: Device, capacity: int = 2) -> None:
    server.enforce_hard_limit(S, StreamState(backlog(client), False, 0, Level.NORMAL, {}), capacity)


def reopen(server: Device, capacity: int = 2) -> None:
    server.enforce_hard_limit(S, StreamState(0, True, 0, Level.NORMAL, {}), capacity)


def commit(server: Device, *entries: RawEntry) -> int:
    return server.commit(S, RESPONSE, [(one, '{"id":"x"}', b"x") for one, _ in entries]).entries
