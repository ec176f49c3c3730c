"""A version takes another's place while long texts and streams are embedded: nothing fails or mixes."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis

from sutra_tasks import Embeddings, StreamingError, StreamReader, embed
from sutra_tasks.engines.simulated_engine import vectors_of
from sutra_tasks.models.registry.model_registry import ModelRegistry
from sutra_tasks.models.rollout.gate import Thresholds
from sutra_tasks.models.rollout.promotion import promote
from tests.system.registry import WIDTH, add_version, space_of
from tests.system.streams import Stream

SHAPE: dict[str, Any] = {
    "sequence_threshold": 32,
    "block_size": 32,
    "overlap_tokens": 6,
    "fanout_chunks": 4,
}
REFERENCES = {space_of(reference): reference for reference in ("search@1", "search@2")}
TEXTS = 400


@pytest.fixture
def swap(
    start_fleet: Callable[..., Any], client: redis.Redis, tmp_path: Path
) -> Callable[[Callable[[], None]], None]:
    """Return what does some work, again and again, before, while and after search@2 becomes current."""
    (tmp_path / "models").mkdir()
    store = ModelRegistry(tmp_path / "models")
    for _ in range(2):
        add_version(store, "search", tmp_path / "sources")
    store.promote("search", 1)

    def work_and_swap(work: Callable[[], None]) -> None:
        options = {"model": "search", "models_dir": str(tmp_path / "models"), **SHAPE}
        with start_fleet(2, **options) as fleet:
            work()
            swapper = threading.Thread(
                target=promote,
                args=(client, store, "search", 2),
                kwargs={"thresholds": Thresholds(), "options": fleet.options},
            )
            swapper.start()
            while swapper.is_alive():
                work()
            swapper.join()
            work()
        assert store.current("search") == 2

    return work_and_swap


def is_of(reference: str, texts: list[str], rows: Any) -> bool:
    expected = vectors_of([reference + text for text in texts], WIDTH)
    return bool(np.allclose(rows, expected, atol=1e-5))


def test_each_long_text_is_of_one_version_in_all_its_parts(swap: Callable[..., None]) -> None:
    words = [f"w{n}" for n in range(400)]
    book = " ".join(words)
    spaces: list[str] = []

    def work() -> None:
        sent = [embed.delay(book, details=True, chunk_vectors=True) for _ in range(6)]
        for result in sent:
            found: Embeddings = result.get(timeout=30)
            chunks = [book[start:end] for start, end in found.spans[0]]
            assert found.chunk_vectors is not None
            assert len(chunks) >= 8
            assert is_of(REFERENCES[found.space], chunks, found.chunk_vectors)
            spaces.append(found.space)

    swap(work)
    assert spaces[0] == space_of("search@1")
    assert spaces[-1] == space_of("search@2")


def test_each_response_of_a_stream_is_of_one_version_and_none_is_missing(
    swap: Callable[..., None], server: str, stream: Stream
) -> None:
    spaces: list[str] = []
    with StreamReader(stream.name, timeout_s=30) as reader:

        def work() -> None:
            stream.add(f"text {n}" for n in range(len(stream.sent), len(stream.sent) + TEXTS))
            for response in reader:
                assert not isinstance(response, StreamingError)
                texts = [stream.sent[chunk.source] for chunk in response.chunks]
                assert is_of(REFERENCES[response.space], texts, response.embeddings)
                spaces.extend(response.space for _ in texts)
                if len(spaces) == len(stream.sent):
                    reader.acknowledge()
                    return

        swap(work)
    assert len(spaces) == len(stream.sent)
    assert spaces[0] == space_of("search@1")
    assert spaces[-1] == space_of("search@2")
