"""Long texts for tests: documents begun, results of their parts, and what was sent."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sutra_tasks import keys
from sutra_tasks.broker.queues import lanes
from sutra_tasks.chunking.answer import AnswerLayout, TextLayout
from sutra_tasks.client.call import Call
from sutra_tasks.fanout.documents import Documents
from sutra_tasks.fanout.sender import Sender
from sutra_tasks.fanout.store import DocumentStore, NewDocument
from sutra_tasks.vectors import Vectors
from tests.redis.flow import message
from tests.redis.peers import waiting

if TYPE_CHECKING:
    import redis

OVERDUE_S = 60
RESULT_TTL_S = 600
CALL = Call(texts=("not kept",), single=True, bytes=8, dimensions=2, details=True)
CALLBACKS = {"callbacks": [{"task": "host.save"}], "errbacks": None, "chain": None, "chord": None}


def documents_on(client: redis.Redis, results: redis.Redis) -> Documents:
    store = DocumentStore(results, overdue_s=OVERDUE_S, progress_ttl_s=RESULT_TTL_S)
    return Documents(store, Sender(client, None))


def new_document(*chunks: int, devices: Sequence[str | None] | None = None) -> NewDocument:
    """Return a call of one text in as many parts, each of so many chunks of 100 tokens."""
    count = sum(chunks)
    text = TextLayout(90 * count, tuple((n, n + 2) for n in range(count)), (1 / count,) * count)
    return NewDocument(
        call=CALL,
        layout=AnswerLayout((text,), "mean"),
        model="model",
        space="space:2",
        parts=[{"texts": [[100, f"part {n}"]] * rows} for n, rows in enumerate(chunks)],
        tokens=[[100] * rows for rows in chunks],
        devices=devices or [None] * len(chunks),
    )


def begin(documents: Documents, number: int = 1, *chunks: int, priority: int = 0, **options: Any) -> str:
    """Have a document begun and return its id."""
    raw = message(number, priority=priority)
    documents.begin(raw, ([], {}, CALLBACKS), new_document(*(chunks or (2, 1, 1)), **options))
    return str(number)


def result_of(part: int, *, by: str = "gpu0") -> dict[str, Any]:
    rows = Vectors.of(np.full((1, 2), part, dtype=np.float32))
    return {"rows": rows, "device": by, "queue_s": 0.5, "compute_s": 0.25}


def sent_to(client: redis.Redis, queue: str = keys.EMBED_QUEUE) -> list[str]:
    """Return the ids in a queue, the next first: those of parts, and the caller's id for a body."""
    return [json.loads(raw)["headers"]["id"] for raw in waiting(client, queue)]


def kept(results: redis.Redis) -> set[str]:
    """Return the keys of documents: all but the callers' results."""
    names = {name.decode() for name in results.scan_iter()}
    return {name for name in names if not name.startswith(keys.result(""))}


def forget_sent(client: redis.Redis) -> None:
    client.delete(*lanes(keys.EMBED_QUEUE))


def make_overdue(results: redis.Redis, *task_ids: str, by_s: float = 1) -> None:
    """Make documents overdue since so many seconds."""
    now: Any = results.time()
    results.zadd(keys.documents(), dict.fromkeys(task_ids, now[0] - by_s), xx=True)


def due_in_s(results: redis.Redis, task_id: str) -> float:
    now: Any = results.time()
    at: Any = results.zscore(keys.documents(), task_id)
    return float(at - now[0])
