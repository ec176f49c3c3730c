"""The public names as a type checker sees them; checked by mypy, never run."""

from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any, assert_type

import numpy as np
from numpy.typing import NDArray

from sutra_tasks import (
    AsyncStreamProducer,
    AsyncStreamReader,
    BackpressureSignal,
    Embeddings,
    EmbedResult,
    NoHealthyWorkersError,
    Settings,
    StreamEntry,
    StreamingError,
    StreamingResponse,
    StreamProducer,
    StreamReader,
    SutraError,
    TooLargeError,
    Vectors,
    embed,
    embed_many,
)
from sutra_tasks.testing import local_fleet, vectors_of


def calls(texts: Iterable[str]) -> None:
    # Celery is untyped: what its results hold, and its signatures, are Any.
    assert_type(embed.delay("text"), EmbedResult)
    assert_type(embed.delay(["a", "b"], dimensions=8, normalize=False).get(timeout=10), Any)
    assert_type(embed.delay(np.array(["a", "b"])), EmbedResult)
    assert_type(embed.apply_async((["a"],), {"details": True}, strategy="round_robin"), EmbedResult)
    assert_type(embed.s("text"), Any)
    assert_type(embed_many(texts, batch=8, in_flight=2, timeout_s=1.5), Iterator[Vectors])
    embed.delay(None)  # type: ignore[arg-type]
    embed.delay([b"bytes"])  # type: ignore[list-item]
    embed_many([1])  # type: ignore[list-item]


def results(vectors: Vectors, details: Embeddings) -> None:
    array: NDArray[np.float32] = vectors
    assert_type(Vectors.of(array), Vectors)
    assert_type(details.vectors, Vectors)
    assert_type(details.space, str)
    assert_type(details.tokens, tuple[int, ...])
    assert_type(details.truncated, tuple[bool, ...])
    assert_type(details.spans, tuple[tuple[tuple[int, int], ...], ...])
    assert_type(details.chunk_vectors, Vectors | None)
    assert_type(details.compute_s, float)
    details.device = "gpu0"  # type: ignore[misc]


def streams(texts: Iterable[str]) -> None:
    with StreamProducer("docs", wait=False) as producer, StreamReader("docs", timeout_s=1) as reader:
        assert_type(producer.send("text", id="1", key="k", end=True), str)
        assert_type(producer.send_many(StreamEntry(text) for text in texts), int)
        assert_type(producer.offer(texts), Iterator[BackpressureSignal])
        for found in reader:
            assert_type(found, StreamingResponse | StreamingError)
            if isinstance(found, StreamingResponse):
                assert_type(found.embeddings, NDArray[np.float32])
                assert_type(found.chunks[0].start, int)
        producer.send(b"bytes")  # type: ignore[arg-type]


async def streams_of_a_loop(texts: AsyncIterator[str]) -> None:
    async with AsyncStreamProducer("docs") as producer, AsyncStreamReader("docs") as reader:
        assert_type(await producer.send("text"), str)
        assert_type(await producer.send_many(texts), int)
        async for found in reader:
            assert_type(found, StreamingResponse | StreamingError)


def errors(error: TooLargeError, fleet: NoHealthyWorkersError) -> None:
    base: SutraError = error
    value: ValueError = error
    assert_type((base, value, error.size), tuple[SutraError, ValueError, int])
    assert_type(fleet.oldest_heartbeat_s, float | None)


def settings() -> None:
    assert_type(Settings.from_env({}), Settings)
    assert_type(Settings(batch_texts=8).batch_texts, int)
    assert_type(Settings().broker_url, str | None)
    Settings(batch_text=8)  # type: ignore[call-arg]


def tests() -> None:
    with local_fleet(width=8, batch_s=0.1):
        pass
    assert_type(vectors_of(["text"], 8), NDArray[np.float32])
