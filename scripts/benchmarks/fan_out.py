"""A document of 64 chunks at 10 ms a chunk, on 1, 2 and 4 simulated devices, through the real fleet.

Every fleet takes the same path: tokenise, chunk, a chord of parts, combine. The results ``2`` and ``4``
are speed-ups over one device; ``overhead_s.n`` is the time that the path adds to the devices' own time.
"""

from __future__ import annotations

import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, Final

import numpy as np

from scripts.benchmarks.local import bench_fleet
from sutra_tasks import embed
from sutra_tasks.batching.batcher import Batcher
from sutra_tasks.batching.next_batch import Limits
from sutra_tasks.batching.service import EmbeddingService
from sutra_tasks.client.call import Call
from sutra_tasks.engines.simulated_engine import SPECIAL_TOKENS, WINDOW, SimulatedEncoder
from sutra_tasks.settings import Settings

CHUNKS: Final = 64
CHUNK_S: Final = 0.010
REPEATS: Final = 15
ASKED: Final = {2: 1.9, 4: 3.6}
"""The least speed-up over one device, by number of devices."""

LEAST_COSINE: Final = 0.99999


def run(*, quick: bool) -> dict[str, Any]:
    """Run the benchmark."""
    counts = (1, 2) if quick else (1, 2, 4)
    # Each fleet has a new process as its client, because a Celery app keeps its first address.
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as processes:
        seconds = {n: processes.submit(_seconds, n, 2 if quick else REPEATS).result() for n in counts}
    return {
        **{str(n): seconds[1] / seconds[n] for n in counts[1:]},
        "asked": {str(n): ASKED[n] for n in counts[1:]},
        "seconds": {str(n): seconds[n] for n in counts},
        "overhead_s": {str(n): seconds[n] - CHUNKS * CHUNK_S / n for n in counts},
    }


def _seconds(devices: int, repeats: int) -> float:
    """Return the median seconds from sending the document to receiving its vector."""
    options = Settings(engine="simulated", simulated_per_token_s=CHUNK_S / WINDOW)
    # All windows are full: the first has a block of tokens, each further one a block less the overlap.
    block = WINDOW - SPECIAL_TOKENS
    words = block + (CHUNKS - 1) * (block - options.overlap_tokens)
    text = " ".join("x" for _ in range(words))
    expected, chunks = _expected(text, options)
    assert chunks == CHUNKS
    with bench_fleet(options, devices=devices):
        took = []
        for _ in range(repeats + 2):
            began = time.perf_counter()
            vector = np.asarray(embed.delay(text).get(timeout=60))
            took.append(time.perf_counter() - began)
            assert float(vector @ expected) >= LEAST_COSINE
        return statistics.median(took[2:])


def _expected(text: str, options: Settings) -> tuple[Any, int]:
    """Return the vector that one device computes without fan-out, and its number of chunks."""
    encoder = SimulatedEncoder()
    batcher = Batcher(Limits(options.batch_tokens, options.batch_texts, 0))
    batcher.start()
    service = EmbeddingService(encoder, batcher, "bench", options)
    try:
        found = service.answer(service.prepare(Call.of((text,), {"details": True}, options)))
        return np.asarray(found.vectors), found.chunks[0]  # type: ignore[union-attr]  # details asked
    finally:
        batcher.close(10)
