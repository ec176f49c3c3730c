"""``embed_many``: any number of texts with bounded memory on both sides."""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Any

from sutra_tasks.errors import InvalidOptionError
from sutra_tasks.tasks import embed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from celery.result import AsyncResult

    from sutra_tasks.vectors import Vectors

__all__ = ["embed_many"]


def embed_many(
    texts: Iterable[str],
    *,
    batch: int = 64,
    in_flight: int = 32,
    timeout_s: float | None = None,
    prompt: str | None = None,
    dimensions: int | None = None,
    normalize: bool = True,
) -> Iterator[Vectors]:
    """Embed any number of texts and yield their vectors in order, each float32 of shape (dim,).

    At most ``batch * in_flight`` texts are on their way at any time: the iterable is read as results
    are taken, and each result is deleted from the server as soon as it has arrived.

    Args:
        texts: read lazily; may be longer than memory.
        batch: texts in one message.
        in_flight: messages sent and not yet yielded.
        timeout_s: seconds to wait for any one message; None waits as long as it takes.
        prompt: as for ``embed``.
        dimensions: as for ``embed``.
        normalize: as for ``embed``.

    Raises:
        InvalidInputError: at the first text that cannot be embedded.
        celery.exceptions.TimeoutError: a message took longer than ``timeout_s``.
    """
    for name, value in (("batch", batch), ("in_flight", in_flight)):
        if value < 1:
            raise InvalidOptionError(name, str(value), "1 or more")
    options = {"prompt": prompt, "dimensions": dimensions, "normalize": normalize}
    return _stream(iter(texts), batch, in_flight, timeout_s, options)


def _stream(
    source: Iterator[str],
    batch: int,
    in_flight: int,
    timeout_s: float | None,
    options: dict[str, Any],
) -> Iterator[Vectors]:
    sent: deque[AsyncResult] = deque()
    try:
        while True:
            while len(sent) < in_flight and (part := list(islice(source, batch))):
                sent.append(embed.delay(part, **options))
            if not sent:
                return
            vectors = sent[0].get(timeout=timeout_s)
            sent.popleft().forget()
            yield from vectors
    finally:
        # Left early or failed: what is still queued need not be computed.
        for result in sent:
            result.revoke()
            result.forget()
