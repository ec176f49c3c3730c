"""The baseline: what a user writes around ``SentenceTransformer.encode`` without this package."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

from celery import Celery

from sutra_tasks.engines.model_folder import locate

address = os.environ["BASELINE_BROKER"]
app = Celery("baseline", broker=address, backend=address)


@cache
def _model() -> Any:
    import torch  # noqa: PLC0415 - after the fork
    from sentence_transformers import SentenceTransformer  # noqa: PLC0415

    torch.set_num_threads(1)
    return SentenceTransformer(locate("all-MiniLM-L6-v2"), device="cpu")


@app.task(name="embed_one")  # type: ignore[untyped-decorator]  # Celery is untyped
def embed_one(text: str) -> list[float]:
    """Embed one text."""
    vector: list[float] = _model().encode(text, normalize_embeddings=True).tolist()
    return vector
