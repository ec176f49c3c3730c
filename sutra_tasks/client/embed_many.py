"""``embed_many``: any number of texts with bounded memory on both sides."""

from __future__ import annotations

import math
import time
from collections import deque
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

import redis
from kombu.exceptions import OperationalError

from sutra_tasks.client.embed_task import embed
from sutra_tasks.errors import (
    FleetSaturated,
    InvalidOptionError,
    ServerUnavailableError,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from sutra_tasks.client.results import EmbedResult
    from sutra_tasks.vectors import Embeddings, Vectors

__all__ = ["embed_many"]

PRIORITY: Final = 6
"""Behind single calls, whose priority is 0; the fleet starves neither."""

AGAIN_S: Final = (0.1, 1.0)
"""Least and most seconds until a saturated fleet is asked again."""


def embed_many(
    texts: Iterable[str],
    *,
    batch: int = 64,
    in_flight: int = 32,
    timeout_s: float | None = None,
    prompt: str | None = None,
    dimensions: int | None = None,
    normalize: bool = True,
    truncate: bool = False,
    model: str | None = None,
    space: str | None = None,
) -> Iterator[Vectors]:
    """Embed any number of texts and yield their vectors in order, each float32 of shape (dim,).

    At most ``batch * in_flight`` texts are on their way at any time: the iterable is read as results
    are taken, and each result is deleted from the server as soon as it has arrived. A saturated fleet,
    and a server that goes away, are waited for. Calls of ``embed`` go before these. All vectors are of
    one embedding space, also where another version of the model takes over meanwhile.

    Args:
        texts: read lazily; may be longer than memory.
        batch: texts in one message.
        in_flight: messages sent and not yet yielded.
        timeout_s: seconds to wait for any one message; None waits as long as it takes.
        prompt: as for ``embed``.
        dimensions: as for ``embed``.
        normalize: as for ``embed``.
        truncate: as for ``embed``.
        model: as for ``embed``.
        space: as for ``embed``; if it is not given, that of the first answer is asked of all others.

    Raises:
        InvalidInputError: at the first text that cannot be embedded.
        celery.exceptions.TimeoutError: a message took longer than ``timeout_s``.
        SpaceUnavailableError: vectors of the space are not to be had, or not any more.
        FleetSaturated: the fleet took no message for ``timeout_s``.
        ServerUnavailableError: the server did not answer, and nothing is on its way.
    """
    for name, value in (("batch", batch), ("in_flight", in_flight)):
        if value < 1:
            raise InvalidOptionError(name, str(value), "1 or more")
    options = {
        "prompt": prompt,
        "dimensions": dimensions,
        "normalize": normalize,
        "details": True,
        "truncate": truncate,
        "model": model,
        "space": space,
    }
    return _stream(iter(texts), batch, in_flight, timeout_s, options)


def _stream(
    source: Iterator[str],
    batch: int,
    in_flight: int,
    timeout_s: float | None,
    options: dict[str, Any],
) -> Iterator[Vectors]:
    sent: deque[tuple[list[str], EmbedResult]] = deque()
    part: list[str] = []
    try:
        while True:
            while len(sent) < in_flight and (part := part or list(islice(source, batch))):
                try:
                    sent.append((part, _sent(part, options, 0 if sent else timeout_s)))
                except (FleetSaturated, ServerUnavailableError):
                    if not sent:
                        raise
                    break  # what is on its way comes first; this part is sent after it
                part = []
            if not sent:
                return
            texts, result = sent[0]
            answer: Embeddings = result.get(timeout=timeout_s)
            with _server_may_be_away():
                result.forget()
            sent.popleft()
            options["space"] = options["space"] or answer.space
            if answer.space == options["space"]:
                yield from answer.vectors
            else:  # it was sent before the first answer said which
                sent.appendleft((texts, _sent(texts, options, timeout_s)))
    finally:
        # Left early or failed: what is still queued need not be computed.
        with _server_may_be_away():
            for _, result in sent:
                result.revoke()
                result.forget()


def _sent(part: list[str], options: dict[str, Any], timeout_s: float | None) -> EmbedResult:
    """Send ``part`` as soon as the fleet takes it, or raise its refusal after ``timeout_s``."""
    least_s, most_s = AGAIN_S
    deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
    while True:
        try:
            return embed.apply_async((part,), options, priority=PRIORITY)
        except FleetSaturated as saturated:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise
            time.sleep(min(max(saturated.retry_after_s, least_s), most_s, left_s))


def _server_may_be_away() -> suppress:
    return suppress(OperationalError, redis.RedisError)  # what is left there expires
