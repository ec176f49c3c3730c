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
"""Calls of ``embed`` have priority 0 and go first; the fleet starves neither."""

SHORTEST_PAUSE_S: Final = 0.1
LONGEST_PAUSE_S: Final = 1.0
"""Seconds until a call that a saturated fleet refused is sent again."""


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

    At most ``batch * in_flight`` texts are on their way at any time: the iterable is read only as fast
    as vectors are taken, and each result is deleted from the server when it has arrived. It waits for a
    saturated fleet, and for a server that is away for a time. Calls of ``embed`` go before these. All
    vectors are of one embedding space, also when another version of the model is promoted meanwhile.

    Args:
        texts: read lazily; may be longer than memory.
        batch: texts in one message.
        in_flight: messages that are sent and whose vectors are not yet yielded.
        timeout_s: seconds to wait for any one message; None waits as long as it takes.
        prompt: as for ``embed``.
        dimensions: as for ``embed``.
        normalize: as for ``embed``.
        truncate: as for ``embed``.
        model: as for ``embed``.
        space: as for ``embed``; None: the space of the first answer is asked of all others.

    Raises:
        InvalidInputError: at the first text that cannot be embedded.
        celery.exceptions.TimeoutError: a message took longer than ``timeout_s``.
        SpaceUnavailableError: no model that is served gives vectors of the space, or none does any more.
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
    return _vectors(iter(texts), batch, in_flight, timeout_s, options)


def _vectors(
    texts: Iterator[str],
    batch: int,
    in_flight: int,
    timeout_s: float | None,
    options: dict[str, Any],
) -> Iterator[Vectors]:
    sent: deque[tuple[list[str], EmbedResult]] = deque()
    next_texts: list[str] = []
    try:
        while True:
            while len(sent) < in_flight and (next_texts := next_texts or list(islice(texts, batch))):
                try:
                    sent.append((next_texts, _send(next_texts, options, 0 if sent else timeout_s)))
                except (FleetSaturated, ServerUnavailableError):
                    if not sent:
                        raise
                    break  # these texts are sent after the next answer has come
                next_texts = []
            if not sent:
                return
            asked, result = sent[0]
            answer: Embeddings = result.get(timeout=timeout_s)
            with _ignoring_outages():
                result.forget()
            sent.popleft()
            options["space"] = options["space"] or answer.space
            if answer.space == options["space"]:
                yield from answer.vectors
            else:  # sent before the first answer told the space
                sent.appendleft((asked, _send(asked, options, timeout_s)))
    finally:
        # The caller stopped early, or a call failed: the calls that wait need not be computed.
        with _ignoring_outages():
            for _, result in sent:
                result.revoke()
                result.forget()


def _send(texts: list[str], options: dict[str, Any], timeout_s: float | None) -> EmbedResult:
    """Send ``texts`` as soon as the fleet takes them, or raise its refusal after ``timeout_s``."""
    deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
    while True:
        try:
            return embed.apply_async((texts,), options, priority=PRIORITY)
        except FleetSaturated as saturated:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise
            pause_s = min(max(saturated.retry_after_s, SHORTEST_PAUSE_S), LONGEST_PAUSE_S)
            time.sleep(min(pause_s, left_s))


def _ignoring_outages() -> suppress:
    return suppress(OperationalError, redis.RedisError)  # results that are left on the server expire
