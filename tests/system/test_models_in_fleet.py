"""Models with a default prompt or with reserved positions, through every entrance of a real fleet."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sutra_tasks import embed, embed_many
from sutra_tasks.batching.batcher import Batcher
from sutra_tasks.batching.next_batch import Limits
from sutra_tasks.batching.service import EmbeddingService
from sutra_tasks.client.call import Call
from sutra_tasks.engines.load import load_engine
from sutra_tasks.settings import Settings
from sutra_tasks.streaming.responses import StreamingResponse, parse_output
from tests.conftest import wait_until
from tests.system.model_kinds import ODD
from tests.system.streams import Stream
from tests.system.tiny_models import PROSE, WINDOW

CLOSE = 0.9999
WORDS = "word " * 600
CHUNKS: dict[str, Any] = {"block_size": 40, "overlap_tokens": 6}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Give a model with a default prompt, and one whose first positions are reserved."""
    return [
        str(ODD[name].build(tmp_path_factory.mktemp("model")))
        for name in ("default prompt", "reserved positions")
    ]


def theirs(model: str, texts: list[str]) -> Any:
    from sentence_transformers import SentenceTransformer

    loaded = SentenceTransformer(model, device="cpu")
    loaded.max_seq_length = WINDOW
    return loaded.encode(texts, normalize_embeddings=True)


def in_chunks(model: str, text: str) -> Any:
    """Return what one device computes of a long text."""
    encoder = load_engine(Settings(model=model, engine="torch", dtype="float32"))
    batcher = Batcher(Limits(max_tokens=8192, max_texts=64, max_wait_s=0))
    batcher.start()
    try:
        service = EmbeddingService(encoder, batcher, "here", Settings(**CHUNKS))
        return service.answer(service.prepare(Call.of([text], {}, Settings())))
    finally:
        batcher.close(10)


def agree(ours: Any, expected: Any) -> None:
    assert np.sum(np.asarray(ours) * expected, axis=-1).min() >= CLOSE


def test_every_entrance_gives_sentence_transformers_own_vectors(
    start_fleet: Callable[..., Any], stream: Stream, models: list[str]
) -> None:
    prompted, reserving = models
    texts = ["fox", PROSE, WORDS]
    options = {
        "engine": "torch", "dtype": "float32", "model": prompted, "models": reserving,
        "fanout_chunks": 4, "heartbeat_s": 1.0, "device_ttl_s": 6.0, "lease_s": 12.0, **CHUNKS,
    }  # fmt: skip
    with start_fleet(2, **options):
        for model in models:
            expected = theirs(model, texts)
            agree(embed.delay(texts, model=model, truncate=True).get(timeout=60), expected)
            agree(embed.delay(texts[2], model=model, truncate=True).get(timeout=60), expected[2])
            agree(np.stack(list(embed_many(texts, model=model, truncate=True))), expected)
            whole = embed.delay(WORDS, model=model, details=True).get(timeout=60)
            assert whole.chunks[0] > 4
            agree(whole.vectors, in_chunks(model, WORDS))
        plain = embed.delay("fox", prompt="").get(timeout=60)
        assert np.dot(plain, theirs(prompted, ["fox"])[0]) < CLOSE
        stream.add(["fox"])
        wait_until(lambda: stream.size("out"))
        written: Any = stream.client.xrange(stream.key("out"))
        response = parse_output(*written[0])
        assert isinstance(response, StreamingResponse)
        agree(response.embeddings, theirs(prompted, ["fox"]))
