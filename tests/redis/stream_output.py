"""The output of a stream on a real server, as tests write it and look at it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sutra_tasks import keys
from sutra_tasks.streaming.responses import EmbeddedChunk, StreamingError, StreamingResponse, hash_of

if TYPE_CHECKING:
    import redis

S = "s"
OUT, DEAD = keys.stream(S, "out"), keys.stream(S, "dead")


def write(client: redis.Redis, fields: Any) -> bytes:
    written: Any = client.xadd(OUT, fields)
    return bytes(written)


def respond(client: redis.Redis, *ids: str) -> bytes:
    """Write a response of so many chunks; each one's row says which it is."""
    chunks = [EmbeddedChunk(name, name, None, 0, 0, 1, False, False, None, 1).to_json() for name in ids]
    rows = np.asarray([[ord(name[0]), len(name)] for name in ids], dtype="<f4")
    return write(
        client,
        {
            "v": 1, "kind": "response", "space": "m:2", "model": "m", "device": "g0", "width": 2,
            "latency_ms": "1.5", "chunks": f"[{','.join(chunks)}]", "vectors": rows.tobytes(),
        },
    )  # fmt: skip


def respond_to(client: redis.Redis, name: str, text: str, entry: str) -> bytes:
    """Write the response of one entry, as devices do: its chunk tells entry and text."""
    chunk = EmbeddedChunk(
        name, name, None, 0, 0, 1, False, False, None, 1, entry, hash_of(text, None, 0)
    )
    row = np.asarray([[ord(name[0]), len(name)]], dtype="<f4").tobytes()
    fields = {"space": "m:2", "model": "m", "device": "g0", "latency_ms": "1.5", "vectors": row}
    return corrupt(client, chunks=f"[{chunk.to_json()}]", **fields)


def corrupt(client: redis.Redis, **fields: Any) -> bytes:
    return write(client, {"v": "1", "kind": "response", **fields})


def ids_of(response: StreamingResponse | StreamingError) -> tuple[str, ...]:
    """Return the ids of what a response holds, having seen that its rows are theirs."""
    if isinstance(response, StreamingResponse):
        assert response.embeddings.tolist() == [[ord(name[0]), len(name)] for name in response.chunk_ids]
    return response.chunk_ids


def left(client: redis.Redis) -> int:
    size: Any = client.xlen(OUT)
    return int(size)


def pending(client: redis.Redis) -> list[bytes]:
    found: Any = client.xpending_range(OUT, keys.READERS_GROUP, "-", "+", 1000)
    return [one["message_id"] for one in found]


def consumers(client: redis.Redis) -> list[Any]:
    """Return the readers that the server remembers."""
    found: Any = client.xinfo_consumers(OUT, keys.READERS_GROUP)
    return list(found)
