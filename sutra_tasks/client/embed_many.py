"""``embed_many``: any number of texts with bounded memory on both sides."""

from __future__ import annotations

import math
import numbers
import os
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import redis
from celery.exceptions import TimeoutError as ResultTimeout
from kombu.exceptions import OperationalError

from sutra_tasks.client.call import Call
from sutra_tasks.client.embed_task import embed
from sutra_tasks.client.texts import divided, iterator_of, numbered
from sutra_tasks.errors import (
    EncodingError,
    FleetSaturated,
    InvalidOptionError,
    InvalidTextError,
    ServerUnavailableError,
)
from sutra_tasks.settings import settings

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from sutra_tasks.client.results import EmbedResult
    from sutra_tasks.client.texts import Texts
    from sutra_tasks.vectors import Embeddings, Vectors

__all__ = ["embed_many"]

PRIORITY: Final = 6
"""Calls of ``embed`` have priority 0 and go first; the fleet starves neither."""

SHORTEST_PAUSE_S: Final = 0.1
LONGEST_PAUSE_S: Final = 1.0
"""Seconds until a call that a saturated fleet refused is sent again."""


@dataclass(slots=True)
class Message:
    """Texts whose vectors the caller has not got yet.

    Attributes:
        asked: the texts, or why there are no more; the caller gets that after all vectors before it.
        result: None: they are not sent, or must be sent again.
        pending_at: when it was last certain that no result had come and expired since.
    """

    asked: Texts | Exception
    result: EmbedResult | None = None
    pending_at: float = 0.0


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
    What expires on the server because the caller takes longer than ``SUTRA_RESULT_TTL_S`` over some
    vectors is sent again. A task of another Celery app may call this.

    Args:
        texts: any iterable of str, read lazily; may be longer than memory. If it raises, its exception
            comes out after the vectors of the texts before.
        batch: texts in one message; fewer where they are over ``SUTRA_MAX_MESSAGE_BYTES``.
        in_flight: messages that are sent and whose vectors are not yet yielded.
        timeout_s: seconds to wait for any one message; None waits as long as it takes.
        prompt: as for ``embed``.
        dimensions: as for ``embed``.
        normalize: as for ``embed``.
        truncate: as for ``embed``.
        model: as for ``embed``.
        space: as for ``embed``; None: the space of the first answer is asked of all others.

    Raises:
        InvalidInputError: ``texts`` is one text or no iterable, an option is invalid, or, after the
            vectors of the texts before it, a text cannot be embedded.
        EncodingError: a device failed on a text; positions in errors count all texts of the call.
        celery.exceptions.TimeoutError: a message took longer than ``timeout_s``.
        SpaceUnavailableError: no model that is served gives vectors of the space, or none does any more.
        FleetSaturated: the fleet took no message for ``timeout_s``.
        ServerUnavailableError: the server did not answer, and nothing is on its way.

    """
    limits = settings()
    for name, value in (("batch", batch), ("in_flight", in_flight)):
        if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
            raise InvalidOptionError(name, repr(value)[:50], "a whole number, 1 or more")
    if timeout_s is not None and not (isinstance(timeout_s, numbers.Real) and timeout_s >= 0):
        raise InvalidOptionError("timeout_s", repr(timeout_s)[:50], "seconds, 0 or more, or None")
    options = {
        "prompt": prompt,
        "dimensions": dimensions,
        "normalize": normalize,
        "details": True,
        "truncate": truncate,
        "model": model,
        "space": space,
    }
    Call.of(((),), options, limits)
    source = divided(iterator_of(texts, "embed_many()"), min(batch, limits.max_texts), limits)
    return _vectors(source, in_flight, timeout_s, options, limits.result_ttl_s)


def _vectors(
    source: Iterator[Texts | Exception],
    in_flight: int,
    timeout_s: float | None,
    options: dict[str, Any],
    ttl_s: float,
) -> Iterator[Vectors]:
    window: deque[Message] = deque()
    process = os.getpid()
    is_ttl_known = False  # workers may keep results for another time than is set here
    try:
        while _send_more(window, source, in_flight, timeout_s, options):
            head = window[0]
            if isinstance(head.asked, Exception):
                raise head.asked
            answer = _await_first(window, timeout_s, ttl_s)
            if head.result is None or answer is None:
                continue
            if not is_ttl_known:
                ttl_s, is_ttl_known = math.ceil(_expires_in_s(head.result) or ttl_s), True
            with _ignoring_outages():
                head.result.forget()
            options["space"] = options["space"] or answer.space
            if answer.space != options["space"]:  # sent before the first answer told the space
                head.result = None
                continue
            window.popleft()
            yield from answer.vectors
            if os.getpid() != process:  # a forked child sends for itself: the parent fetches its own
                process = os.getpid()
                for message in window:
                    message.result = None
            _drop_expired(window, ttl_s)
    finally:
        # The caller stopped early, or a call failed: the calls that wait need not be computed.
        if os.getpid() == process:
            for message in window:
                _withdraw(message)


def _send_more(
    window: deque[Message],
    source: Iterator[Texts | Exception],
    in_flight: int,
    timeout_s: float | None,
    options: dict[str, Any],
) -> bool:
    """Send what the window has unsent, and fill it from ``source``; return whether there is anything.

    Raises:
        FleetSaturated: the fleet did not take the first message for ``timeout_s``.
        ServerUnavailableError: the first message could not be sent.
    """
    while True:
        unsent = next((one for one in window if one.result is None), None)
        if unsent is None:
            if len(window) == in_flight or (asked := next(source, None)) is None:
                return bool(window)
            window.append(unsent := Message(asked))
        if isinstance(unsent.asked, Exception):
            return True
        is_first = unsent is window[0]
        try:
            unsent.pending_at = time.monotonic()
            unsent.result = _send(unsent.asked.texts, options, timeout_s if is_first else 0)
        except (FleetSaturated, ServerUnavailableError):
            if is_first:
                raise
            return True  # these texts are sent after the next answer has come


def _send(texts: list[str], options: dict[str, Any], timeout_s: float | None) -> EmbedResult:
    """Send ``texts`` as soon as the fleet takes them, or raise its refusal after ``timeout_s``."""
    deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
    while True:
        try:
            # A task that calls this must not collect the results of all messages as its children.
            return embed.apply_async((texts,), options, priority=PRIORITY, add_to_parent=False)
        except FleetSaturated as saturated:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise
            pause_s = min(max(saturated.retry_after_s, SHORTEST_PAUSE_S), LONGEST_PAUSE_S)
            time.sleep(min(pause_s, left_s))


def _await_first(window: deque[Message], timeout_s: float | None, ttl_s: float) -> Embeddings | None:
    """Wait for the answer to the first message; None: it must be sent again."""
    head = window[0]
    assert not isinstance(head.asked, Exception)
    deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
    while head.result is not None:
        left_s = max(0.0, deadline - time.monotonic())
        try:
            answer: Embeddings = head.result.get(timeout=min(left_s, ttl_s / 4))
        except ResultTimeout:
            if left_s <= ttl_s / 4:
                raise
            _drop_expired(window, ttl_s)
        except (EncodingError, InvalidTextError) as error:
            raise numbered(error, head.asked.start) from None
        else:
            return answer
    return None


def _drop_expired(window: deque[Message], ttl_s: float) -> None:
    """Have messages sent again whose results may have come, and expired, while nobody looked.

    A result that had not come when it was last looked for is kept for ``ttl_s`` from then on at the
    least. So this looks often enough while the caller waits, and only a caller that is away for longer
    than that makes it uncertain.
    """
    now = time.monotonic()
    for message in window:
        if message.result is None or now - message.pending_at < ttl_s / 2:
            continue
        if _has_come(message.result):
            message.pending_at = math.inf
        elif now - message.pending_at < ttl_s:
            message.pending_at = now
        else:
            _withdraw(message)


def _has_come(result: EmbedResult) -> bool:
    """Return whether a result is in this process, or still on the server."""
    try:
        result.get(timeout=0, propagate=False)
    except ResultTimeout:
        return False
    return True


def _expires_in_s(result: EmbedResult) -> float | None:
    if not hasattr(result, "expires_in_s"):
        return None  # of an app that is eager, as in tests of applications
    with _ignoring_outages():
        return result.expires_in_s()
    return None


def _withdraw(message: Message) -> None:
    """Tell the fleet that nobody waits for a message any more."""
    result, message.result = message.result, None
    if result is not None:
        with _ignoring_outages():
            result.revoke()
            result.forget()


def _ignoring_outages() -> suppress:
    return suppress(OperationalError, redis.RedisError)  # results that are left on the server expire
