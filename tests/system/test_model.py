"""The real model through the whole fleet, against sentence-transformers on the same texts."""

import os
import random
import signal
import time
from pydoc_data.topics import topics

import numpy as np
import pytest

from sutra_tasks import embed

AGREEMENT = 0.99999


@pytest.fixture(scope="module")
def corpus():
    """Every fifth topic of the manual whole (most are over the window), and some of its paragraphs."""
    paragraphs = [p for topic in topics.values() for p in topic.split("\n\n")]
    odd = ["", "\0", "é" * 300, "日本語のテキスト", "🙂"]
    return [*list(topics.values())[::5], *paragraphs[::45], *odd]


@pytest.fixture(scope="module")
def reference(corpus):
    from sentence_transformers import SentenceTransformer

    from sutra_tasks.engines.model_folder import locate

    model = SentenceTransformer(locate("all-MiniLM-L6-v2"), device="cpu")
    return model.encode(corpus, normalize_embeddings=True), model


def test_every_vector_is_sentence_transformers_own_however_it_was_batched(
    start_fleet, corpus, reference, wait_until
):
    expected, model = reference
    with start_fleet(
        2, engine="torch", dtype="float32", heartbeat_s=1.0, device_ttl_s=6.0, lease_s=12.0
    ) as fleet:
        order = list(range(len(corpus)))
        random.Random(7).shuffle(order)
        parts, results = [], []
        while order:
            size = random.Random(len(order)).choice([1, 2, 7, 30])
            part, order = order[:size], order[size:]
            parts.append(part)
            results.append(embed.delay([corpus[i] for i in part], details=True, truncate=True))
        for part, result in zip(parts, results, strict=True):
            got = result.get(timeout=120)
            cosines = (np.asarray(got.vectors) * expected[part]).sum(axis=1)
            assert cosines.min() >= AGREEMENT, [corpus[i][:40] for i in part]
            whole = [len(model.tokenizer(corpus[i])["input_ids"]) for i in part]
            assert got.truncated == tuple(n > 256 for n in whole)
            assert got.tokens == tuple(min(n, 256) for n in whole)

        cut = embed.delay(corpus[:4], dimensions=128, prompt="query", truncate=True).get(timeout=60)
        matryoshka = model.encode(corpus[:4], truncate_dim=128, normalize_embeddings=True)
        assert (np.asarray(cut) * matryoshka).sum(axis=1).min() >= AGREEMENT

        victim = fleet.device_ids[0]
        killed = fleet.pid(victim)
        began = time.monotonic()
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: fleet.pid(victim) != killed and victim in fleet.live(), within_s=15)
        assert time.monotonic() - began < 15
        assert embed.delay("served again").get(timeout=15).shape == (384,)
