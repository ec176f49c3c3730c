"""Celery's options of a call, checked where it is made: those that the fleet cannot follow are refused.

A message with such an option would be lost on its way, or would do something else than its sender means.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from celery.utils.time import maybe_iso8601
from kombu.utils import json as kombu_json

from sutra_tasks import keys
from sutra_tasks.client.call import OPTIONS, Call
from sutra_tasks.errors import CallbackQueueError, InvalidInputError, InvalidOptionError

if TYPE_CHECKING:
    from collections.abc import Callable

    from sutra_tasks.settings import Settings

__all__ = ["check_callbacks", "check_message", "check_options", "refuse_mapped"]

COMPRESSIONS: Final = ("gzip", "zlib", "bzip2", "bzip", "lzma", "xz")
"""Methods that every Python can undo; workers may lack the packages of the others."""

LOWEST_PRIORITY: Final = 9
MOST_ID_CHARS: Final = 200
MOST_DELAY_S: Final = 1e9  # 31 years

_MAPPED: Final = ("celery.map", "celery.starmap", "celery.chunks")
_CELERYS_HEADERS: Final = ("id", "task", "lang")


def check_options(options: Mapping[str, Any]) -> None:
    """Check Celery's options of a call of ``embed``.

    Raises:
        InvalidOptionError: it names the option, and says what to write instead.
    """
    for name in OPTIONS:
        if name in options:
            raise InvalidOptionError(
                name, "...", f"it among the arguments: apply_async((texts,), {{'{name}': ...}})"
            )
    for name in ("queue", "routing_key"):
        value = options.get(name)
        if value is not None and not _is_our_queue(value):
            raise InvalidOptionError(
                name, _shown(value), "none: routers take calls from the fleet's own queue only"
            )
    check_message(options)


def check_message(options: Mapping[str, Any]) -> None:
    """Check those of Celery's options that mean the same for every task of this package.

    Raises:
        InvalidOptionError: it names the option, and says what to write instead.
    """
    for name, (accepts, expected) in _CHECKS.items():
        value = options.get(name)
        if value is not None and not accepts(value):
            raise InvalidOptionError(name, _shown(value), expected)


def check_callbacks(options: Mapping[str, Any], limits: Settings) -> None:
    """Check everything that is to run after a call, before the call is sent.

    Raises:
        InvalidOptionError: it is no signature, or a signature of ``embed`` has such an option.
        InvalidInputError: a signature of ``embed`` can never succeed.
        CallbackQueueError: a signature of another app's task names no queue.
    """
    for option in ("link", "link_error", "chain", "chord"):
        given = options.get(option)
        for signature in _signatures(option, given):
            _check_signature(option, signature, limits)
        for one in given if isinstance(given, list | tuple) else [given]:
            if one is not None and one["task"] == keys.EMBED_TASK:
                _check_own_texts(option, one)


def refuse_mapped(method: str) -> InvalidInputError:
    """Return the error of ``embed.map`` and its like.

    Args:
        method: that was called.
    """
    return InvalidInputError(
        f"embed.{method}: Celery would loop over the texts in one worker, one call after the other. "
        "Write embed.delay(list_of_texts), embed_many(texts), or "
        "group(embed.s(texts) for texts in lists)"
    )


def _signatures(option: str, given: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the signatures in ``given``, and those in its groups, chords and chains."""
    if given is None:
        return
    for one in given if isinstance(given, list | tuple) else [given]:
        if not isinstance(one, Mapping) or not isinstance(one.get("task"), str):
            raise InvalidOptionError(option, type(one).__name__, "a signature, such as task.s(...)")
        yield one
        if one["task"].startswith("celery."):
            inner = one.get("kwargs") or {}
            for name in ("tasks", "task", "header", "body"):
                yield from _signatures(option, inner.get(name))


def _check_signature(option: str, signature: Mapping[str, Any], limits: Settings) -> None:
    task, options = signature["task"], signature.get("options") or {}
    if task == keys.EMBED_TASK:
        check_options(options)
        # The result of the task before it is its texts, unless the signature is immutable.
        args = signature.get("args") or () if signature.get("immutable") else [()]
        Call.of(args, signature.get("kwargs") or {}, limits)
        return
    is_own = task.startswith(("celery.", keys.OWN_TASK_PREFIX)) and task not in _MAPPED
    if not (is_own or options.get("queue") or options.get("exchange")):
        raise CallbackQueueError(task, option)


def _check_own_texts(option: str, signature: Mapping[str, Any]) -> None:
    if signature.get("args") and not signature.get("immutable"):
        raise InvalidInputError(
            f"{option}: embed.s(texts) would get the result of the task before it as well as its own "
            "texts. Write embed.si(texts) for these alone, or embed.s() for that result."
        )


def _is_str(value: Any) -> bool:
    return isinstance(value, str)


def _is_seconds(value: Any) -> bool:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return abs(float(value)) <= MOST_DELAY_S  # false for NaN, too
    except OverflowError:
        return False


def _is_moment(value: Any) -> bool:
    """Return whether a value is a datetime, or one in text, as canvases pass on."""
    if not isinstance(value, str):
        return isinstance(value, datetime)
    try:
        return isinstance(maybe_iso8601(value), datetime)
    except ValueError:
        return False


def _is_priority(value: Any) -> bool:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        return False
    return 0 <= int(value) <= LOWEST_PRIORITY


def _is_our_queue(value: Any) -> bool:
    name = str(getattr(value, "name", value))
    return name == keys.EMBED_QUEUE or name.startswith(keys.DEVICE_QUEUE_PREFIX)


def _are_headers(value: Any) -> bool:
    if not isinstance(value, Mapping) or any(name in value for name in _CELERYS_HEADERS):
        return False
    try:
        kombu_json.dumps(dict(value))
    except (TypeError, ValueError):
        return False
    return True


_CHECKS: Final[Mapping[str, tuple[Callable[[Any], bool], str]]] = {
    "serializer": (lambda value: value == "json", "json, which alone the workers read"),
    "compression": (lambda value: value in COMPRESSIONS, f"one of {', '.join(COMPRESSIONS)}"),
    "priority": (_is_priority, f"a whole number, 0 (first) to {LOWEST_PRIORITY} (last)"),
    "countdown": (_is_seconds, "a number of seconds"),
    "eta": (_is_moment, "a datetime"),
    "expires": (lambda value: _is_seconds(value) or _is_moment(value), "seconds or a datetime"),
    "exchange": (
        lambda value: getattr(value, "name", value) == "",
        "none: it has no queue of the fleet",
    ),
    "task_id": (
        lambda value: isinstance(value, str) and 0 < len(value) <= MOST_ID_CHARS,
        f"a str of 1 to {MOST_ID_CHARS} characters",
    ),
    **dict.fromkeys(("shadow", "reply_to", "root_id", "parent_id", "group_id"), (_is_str, "a str")),
    "ignore_result": (lambda value: isinstance(value, bool), "True or False"),
    "retry_policy": (lambda value: isinstance(value, Mapping), "a mapping, as Celery describes it"),
    "content_type": (lambda _: False, "none: messages are JSON"),
    "content_encoding": (lambda _: False, "none: messages are JSON"),
    "expiration": (lambda _: False, "none: expires= is the deadline"),
    "headers": (_are_headers, f"JSON by name, without {', '.join(_CELERYS_HEADERS)}"),
}
"""For each option what it may be, and what an error says about that."""


def _shown(value: object) -> str:
    """Return a value for an error: short, and only of kinds that hold no text of a caller."""
    if isinstance(value, str | numbers.Number | datetime):
        return repr(value)[:50]
    return type(value).__name__
