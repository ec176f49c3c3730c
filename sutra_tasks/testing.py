"""A fleet inside the process, without a server or torch, for tests of projects that use this package.

    @pytest.fixture
    def fleet():
        with sutra_tasks.testing.local_fleet() as fleet:
            yield fleet

Every ``embed`` call inside is answered at once with the simulated engine's vectors: deterministic, unit
length, equal for equal texts and nearly orthogonal for different ones. Results travel through JSON as
they do in production, so a result that cannot be sent fails here too.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from kombu.utils import json as kombu_json

from sutra_tasks.app import app
from sutra_tasks.batching.batcher import Batcher
from sutra_tasks.batching.next_batch import Limits
from sutra_tasks.batching.service import EmbeddingService
from sutra_tasks.client.embed_task import serve
from sutra_tasks.engines.simulated_engine import SimulatedEncoder, vectors_of
from sutra_tasks.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sutra_tasks.client.call import Call
    from sutra_tasks.vectors import Embeddings, Vectors

__all__ = ["local_fleet", "vectors_of"]


@contextmanager
def local_fleet(*, width: int = 384, batch_s: float = 0.0) -> Iterator[None]:
    """Answer every ``embed`` call of this process without a broker.

    Args:
        width: dimensions of the vectors.
        batch_s: seconds that every batch takes, to see how a caller behaves while it waits.
    """
    encoder = SimulatedEncoder(width=width, fixed_s=batch_s)
    batcher = Batcher(Limits(max_tokens=8192, max_texts=128, max_wait_s=0))
    service = EmbeddingService(encoder, batcher, "test", Settings())

    def answer(call: Call) -> Vectors | Embeddings:
        travelled: Vectors | Embeddings = kombu_json.loads(
            kombu_json.dumps(service.answer(service.prepare(call)))
        )
        return travelled

    was_eager = app.conf.task_always_eager
    batcher.start()
    app.conf.task_always_eager = True
    previous = serve(answer)
    try:
        yield
    finally:
        serve(previous)
        app.conf.task_always_eager = was_eager
        batcher.close(timeout_s=5)
