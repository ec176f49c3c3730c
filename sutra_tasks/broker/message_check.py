"""What a message must look like for a worker to run it; pure.

Whoever can reach the server can put anything on our queues: foreign clients, other releases, mistakes.
Each message is checked where it is taken, against Celery's protocol 2 (docs.celeryq.dev, Message
Protocol), so that what comes after may trust every type. The first field at fault is named.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final

from celery.app.task import Context
from celery.canvas import maybe_signature
from kombu.utils.json import loads

from sutra_tasks import keys
from sutra_tasks.broker.inflate import COMPRESSIONS, inflate
from sutra_tasks.errors import InvalidMessageError

__all__ = [
    "check_attempts",
    "check_body",
    "check_message",
    "decode_body",
    "is_id",
    "parse",
    "readable_id",
]

TASKS: Final = {
    keys.EMBED_QUEUE: (keys.EMBED_TASK, keys.PART_TASK, keys.COMBINE_TASK),
    keys.CONTROL_QUEUE: (keys.HEALTH_TASK, keys.MEMORY_TASK),
    keys.DISTILL_QUEUE: (keys.DISTILL_TASK, keys.DISTILL_DUE_TASK),
}
"""The tasks of each queue; those of devices have the tasks of the router's."""

WITHOUT_ARGUMENTS: Final = (
    keys.PART_TASK, keys.COMBINE_TASK, keys.HEALTH_TASK, keys.MEMORY_TASK, keys.DISTILL_DUE_TASK,
)  # fmt: skip
MOST_ID_CHARS: Final = 255
FIRST_YEAR, LAST_YEAR = 1970, 9998  # at both ends of time, zones cannot be converted
ENCODINGS: Final = (None, "utf-8", "utf8", "ascii", "us-ascii", "binary")
CALLBACKS: Final = ("callbacks", "errbacks", "chain")
BYTES_OF_JSON_PER_BYTE: Final = 6
"""JSON writes a control character of one byte as ``\\u0000``."""
ROOM_BYTES: Final = 1 << 20
"""For everything in a body that is no text."""

_TEXT: Final = (str, type(None))
_WHOLE: Final = (int, type(None))
HEADERS: Final[Mapping[str, tuple[type, ...]]] = {
    "root_id": _TEXT,
    "parent_id": _TEXT,
    "group": _TEXT,
    "shadow": _TEXT,
    "argsrepr": _TEXT,
    "kwargsrepr": _TEXT,
    "origin": _TEXT,
    "group_index": _WHOLE,
    "retries": _WHOLE,
    "ignore_result": (bool, type(None)),
    "stamped_headers": (list, type(None)),
    "stamps": (dict, type(None)),
    "timelimit": (list, type(None)),
    "eta": _TEXT,
    "expires": _TEXT,
    "compression": _TEXT,
}
"""The types of headers that Celery's workers use, if they are there."""

OPTIONS: Final[Mapping[str, tuple[type, ...]]] = {
    **dict.fromkeys(("queue", "exchange", "routing_key", "serializer", "compression"), _TEXT),
    **dict.fromkeys(("task_id", "root_id", "parent_id", "group_id", "reply_to", "shadow"), _TEXT),
    **dict.fromkeys(("priority", "retries", "max_retries", "group_index"), _WHOLE),
    "countdown": (int, float, type(None)),
    "expires": (int, float, str, datetime, type(None)),
    "eta": (str, datetime, type(None)),
    "headers": (dict, type(None)),
}
"""The types of the options of a callback with which Celery sends it, if they are there."""

RESERVED: Final = frozenset(name for name in dir(Context) if not name.startswith("__")) - {
    "task", "id", "correlation_id", "reply_to", "replaced_task_nesting", *HEADERS,
}  # fmt: skip
"""Headers become attributes of the task's request, and must not replace any of Celery's."""

PROPERTIES: Final[Mapping[str, tuple[type, ...]]] = {
    "correlation_id": _TEXT,
    "reply_to": _TEXT,
    "priority": _WHOLE,
    "delivery_info": (dict, type(None)),
}

_NAMES: Final = {
    str: "text", int: "a whole number", bool: "true or false", list: "a list", dict: "an object",
    float: "a number", datetime: "a time", type(None): "null",
}  # fmt: skip


def parse(raw: bytes) -> Any:
    """Return what stands in a queue's list as JSON.

    Raises:
        InvalidMessageError: it is not JSON.
    """
    try:
        return loads(raw)
    except Exception:  # noqa: BLE001 - whatever the bytes are, they are no message
        raise InvalidMessageError("message", "it is not JSON") from None


def readable_id(payload: Any) -> str | None:
    """Return the id under which the sender of a message may wait for its result; None: there is none."""
    if not isinstance(payload, dict):
        return None
    headers, properties = payload.get("headers"), payload.get("properties")
    given = (
        headers.get("id") if isinstance(headers, dict) else None,
        properties.get("correlation_id") if isinstance(properties, dict) else None,
    )
    for one in given:
        text = str(one) if type(one) is int else one
        if is_id(text):
            return str(text)
    return None


def check_message(payload: Any, queue: str, *, most_bytes: int) -> None:
    """Check everything in a message but its body, of which only the size and the coding are looked at.

    Args:
        payload: the parsed message.
        queue: the queue it was taken from; one that is not ours has any tasks.
        most_bytes: ``SUTRA_MAX_MESSAGE_BYTES``.

    Raises:
        InvalidMessageError: it names the field at fault.
    """
    _is_a(payload, "message", dict)
    _check_properties(payload.get("properties"))
    tasks = TASKS.get(keys.EMBED_QUEUE if queue.startswith(keys.DEVICE_QUEUE_PREFIX) else queue)
    if tasks is None:
        return
    headers = payload.get("headers")
    _is_a(headers, "headers", dict)
    if "task" not in headers:
        reason = "it is missing; a sender with Celery's old protocol 1 needs task_protocol = 2"
        raise InvalidMessageError("headers.task", reason)
    if headers["task"] not in tasks:
        raise InvalidMessageError("headers.task", f"tasks of {queue} are {', '.join(tasks)}")
    if not is_id(headers.get("id")):
        reason = f"it must be text of 1 to {MOST_ID_CHARS} characters"
        raise InvalidMessageError("headers.id", reason)
    _check_headers(headers)
    _check_coding(payload, most_bytes)


def decode_body(payload: Mapping[str, Any], *, most_bytes: int) -> tuple[bytes, Any]:
    """Return the body of a message that was checked, and what it says as JSON.

    Args:
        payload: the parsed message.
        most_bytes: ``SUTRA_MAX_MESSAGE_BYTES``.

    Returns:
        The body as the sender serialized it, and the decoded arguments, options and callbacks.

    Raises:
        InvalidMessageError: it cannot be decoded, or has another shape.
    """
    try:
        body = payload["body"].encode()
        if payload["properties"].get("body_encoding") == "base64":
            body = base64.b64decode(body, validate=True)
    except ValueError:
        raise InvalidMessageError("body", "it is not base64") from None
    if compression := payload["headers"].get("compression"):
        body = inflate(body, compression, _most_json_bytes(most_bytes))
    try:
        decoded = loads(body)
    except Exception:  # noqa: BLE001 - whatever the bytes are, they are no arguments
        raise InvalidMessageError("body", "it is not JSON in UTF-8") from None
    check_body(decoded)
    if payload["headers"]["task"] in WITHOUT_ARGUMENTS and (decoded[0] or decoded[1]):
        raise InvalidMessageError("body", f"{payload['headers']['task']} has no arguments")
    return body, decoded


def check_attempts(attempts: int, most_attempts: int) -> None:
    """Check that workers did not fail with a message too often.

    Raises:
        InvalidMessageError: they did.
    """
    if attempts >= most_attempts:
        raise InvalidMessageError("message", f"{attempts} workers failed with it")


def check_body(decoded: Any) -> None:
    """Check the shape of a decoded body: arguments, options and callbacks.

    Raises:
        InvalidMessageError: it names the part at fault.
    """
    _is_a(decoded, "body", list)
    if len(decoded) != 3:  # noqa: PLR2004 - Celery's protocol
        reason = f"a list of arguments, options and callbacks is needed; this one has {len(decoded)}"
        raise InvalidMessageError("body", reason)
    args, kwargs, callbacks = decoded
    _is_a(args, "body[0]", list)
    _is_a(kwargs, "body[1]", dict)
    _is_a(callbacks, "body[2]", dict, type(None))
    for name, value in (callbacks or {}).items():
        if name in CALLBACKS:
            _is_a(value, f"body[2].{name}", list, type(None))
            for at, one in enumerate(value or []):
                _check_signature(one, f"body[2].{name}[{at}]")
        elif name == "chord":
            if value is not None:
                _check_signature(value, "body[2].chord")
        else:
            raise InvalidMessageError("body[2]", f"it may have {', '.join(CALLBACKS)} and chord only")


def _check_properties(properties: Any) -> None:
    _is_a(properties, "properties", dict)
    _check_types(properties, "properties", PROPERTIES)
    delivery_info = properties.get("delivery_info") or {}
    for name in ("exchange", "routing_key"):
        _is_a(delivery_info.get(name), f"properties.delivery_info.{name}", *_TEXT)
    if properties.get("body_encoding") not in (None, "base64"):
        raise InvalidMessageError("properties.body_encoding", "it must be base64")


def _check_coding(payload: Mapping[str, Any], most_bytes: int) -> None:
    if payload.get("content-type") != "application/json":
        raise InvalidMessageError("content-type", "workers accept application/json only")
    if payload.get("content-encoding") not in ENCODINGS:
        raise InvalidMessageError("content-encoding", "it must be utf-8")
    body: Any = payload.get("body")
    _is_a(body, "body", str)
    most = _most_json_bytes(most_bytes) * 4 // 3  # base64 has four characters for three bytes
    if len(body) > most:
        raise InvalidMessageError("body", f"it has {len(body)} bytes, and {most} are allowed")


def _check_headers(headers: Mapping[str, Any]) -> None:
    _check_types(headers, "headers", HEADERS)
    if not RESERVED.isdisjoint(headers):
        clashes = RESERVED & headers.keys()
        raise InvalidMessageError(f"headers.{min(clashes)}", "Celery uses this name otherwise")
    for name in ("eta", "expires"):
        if headers.get(name):
            _check_time(headers[name], f"headers.{name}")
    limits = headers.get("timelimit") or []
    if len(limits) not in (0, 2):
        raise InvalidMessageError("headers.timelimit", "two numbers or nulls are needed")
    for at, limit in enumerate(limits):
        _is_a(limit, f"headers.timelimit[{at}]", int, float, type(None))
    for at, name in enumerate(headers.get("stamped_headers") or []):
        _is_a(name, f"headers.stamped_headers[{at}]", str)
    compression = headers.get("compression")
    if compression is not None and compression not in COMPRESSIONS:
        known = ", ".join(sorted(COMPRESSIONS))
        raise InvalidMessageError("headers.compression", f"workers know {known}")


def _check_time(text: str, field: str) -> None:
    try:
        year = datetime.fromisoformat(text).year
    except ValueError:
        year = 0
    if not FIRST_YEAR <= year <= LAST_YEAR:
        raise InvalidMessageError(field, "it must be a time such as 2026-01-31T12:00:00+00:00")


def _check_signature(value: Any, field: str) -> None:
    """Check that Celery can make a signature of a value, with everything in it."""
    _is_a(value, field, dict)
    _is_a(value.get("task"), f"{field}.task", str)
    shapes: dict[str, tuple[type, ...]] = {
        "args": (list,),
        "kwargs": (dict,),
        "options": (dict,),
        "subtask_type": _TEXT,
        "chord_size": _WHOLE,
    }
    _check_types(value, field, shapes)
    _check_types(value["options"], f"{field}.options", OPTIONS)
    for name in ("link", "link_error"):
        linked = value["options"].get(name) or []
        for at, one in enumerate(linked if isinstance(linked, list) else [linked]):
            _check_signature(one, f"{field}.options.{name}[{at}]")
    try:
        maybe_signature(value)
    except Exception:  # noqa: BLE001 - Celery's own classes trust what they are given
        raise InvalidMessageError(field, "it is not a signature of Celery") from None


def _check_types(
    values: Mapping[str, Any], field: str, types_by_name: Mapping[str, tuple[type, ...]]
) -> None:
    """Check the types of some values; one that is missing counts as null."""
    for name, types in types_by_name.items():
        if type(values.get(name)) not in types:
            _is_a(values.get(name), f"{field}.{name}", *types)


def _is_a(value: Any, field: str, *types: type) -> None:
    """Check a value's type; true and false are no numbers here."""
    if type(value) not in types:
        needed = " or ".join(_NAMES[one] for one in types)
        found = _NAMES.get(type(value), "something else")
        raise InvalidMessageError(field, f"{needed} is needed, not {found}")


def is_id(value: Any) -> bool:
    """Return whether a value can be the id of a task, which names a key."""
    if not isinstance(value, str) or not 0 < len(value) <= MOST_ID_CHARS:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # a lone surrogate, which names no key
        return False
    return True


def _most_json_bytes(most_bytes: int) -> int:
    return BYTES_OF_JSON_PER_BYTE * most_bytes + ROOM_BYTES
