"""The messages of the parts of a long text, and of the body that combines them.

They are made from the message of the call that they replace, as they stand in a Redis list, in Celery's
protocol 2 (docs.celeryq.dev, Message Protocol). A publisher would take a millisecond for each.
"""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Final

from kombu.utils import json as kombu_json

from sutra_tasks import keys
from sutra_tasks.broker.attempts import ATTEMPTS, DEATHS_NEARBY
from sutra_tasks.client.call import BYTES_PER_TOKEN, HEADER, TOKENS_PER_TEXT, Demand
from sutra_tasks.client.call import VERSION as HEADER_VERSION

__all__ = ["BODY", "BODY_DEMAND", "body_message", "part_demand", "part_message"]

BODY: Final = "sutra_body"
"""Header of a part: the message of the body, to tell the caller if the document is lost."""

BODY_DEMAND: Final = Demand(texts=1, bytes=0, sent_at=None, strategy=None)
"""The body's demand: adding up vectors costs next to nothing beside computing them."""


def part_demand(rows: int, tokens: int, strategy: str | None = None) -> Demand:
    """Return the demand of a part: with as many bytes as are estimated to be its tokens."""
    size = BYTES_PER_TOKEN * max(0, tokens - TOKENS_PER_TEXT * rows)
    return Demand(rows, size, sent_at=None, strategy=strategy)


def body_message(message: bytes, payload: Sequence[Any]) -> str:
    """Return the message of the body: the caller's own, without texts, under another task name.

    Args:
        message: the caller's message, as it stands in its list.
        payload: its decoded body: arguments, options and callbacks.
    """
    _, _, callbacks = payload
    body: dict[str, Any] = json.loads(message)
    headers = body["headers"]
    for name in (ATTEMPTS, DEATHS_NEARBY, "redelivered", "compression"):
        headers.pop(name, None)
    header = headers.get(HEADER)
    sent = header if isinstance(header, dict) else {"v": HEADER_VERSION}
    headers |= {
        "task": keys.COMBINE_TASK,
        "argsrepr": "()",
        "kwargsrepr": "{}",
        HEADER: {**sent, "texts": BODY_DEMAND.texts, "bytes": BODY_DEMAND.bytes},
    }
    return _sealed(body, callbacks)


def part_message(body: Mapping[str, Any], index: int, parts: int, rows: int, tokens: int) -> str:
    """Return the message of a part: always the same for the same part, but for its delivery tag.

    Args:
        body: the decoded message of the body.
        index: the number of the part.
        parts: how many parts there are.
        rows: the rows of the part.
        tokens: the tokens of these rows.
    """
    of = body["headers"]
    chord: dict[str, Any] = {
        "task": keys.COMBINE_TASK,
        "args": [],
        "kwargs": {},
        "options": {"task_id": of["id"], "queue": keys.EMBED_QUEUE},
        "subtask_type": None,
        "immutable": True,
        "chord_size": parts,
    }
    headers = {
        **of,
        "task": keys.PART_TASK,
        "id": f"{of['id']}:{index}",
        "parent_id": of["id"],
        "group": of["id"],
        "group_index": index,
        "ignore_result": True,
        "retries": 0,
        HEADER: {**of[HEADER], "texts": rows, "bytes": part_demand(rows, tokens).bytes},
        BODY: json.dumps(body),
    }
    properties = {**body["properties"], "correlation_id": headers["id"]}
    part = {**body, "headers": headers, "properties": properties}
    return _sealed(part, {"callbacks": None, "errbacks": None, "chain": None, "chord": chord})


def _sealed(message: dict[str, Any], callbacks: Mapping[str, Any]) -> str:
    """Return a message without arguments as it stands in a list."""
    # kombu's JSON, because callbacks may have arguments that plain JSON has no form for, such as a date.
    arguments = kombu_json.dumps([[], {}, callbacks]).encode()
    properties = {
        **message["properties"],
        "body_encoding": "base64",
        "delivery_tag": str(uuid.uuid4()),
        "delivery_info": {"exchange": "", "routing_key": keys.EMBED_QUEUE},
    }
    sealed = {
        **message,
        "body": base64.b64encode(arguments).decode("ascii"),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "properties": properties,
    }
    return json.dumps(sealed)
