"""Makes messages that are almost right: valid ones of each queue, changed in their structure."""

from __future__ import annotations

import base64
import bz2
import json
import random
import uuid
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from sutra_tasks import keys
from sutra_tasks.app import app
from sutra_tasks.client.embed_task import embed

__all__ = ["FuzzedMessage", "Fuzzer"]

ODD_VALUES: Final[tuple[Any, ...]] = (
    None, True, False, 0, -1, 5, 2**31, 2**63, 10**400, 1.5, -0.0, 1e308, float("nan"), float("inf"),
    "", " ", "x", "x" * 300, "0", "-1", "null", "\x00", "\ud800", "é" * 50, "../../etc/passwd",
    "a\nb\r\n", "2020-01-01T00:00:00", "9999-12-31T23:59:59+00:00", "0001-01-01T00:00:00+14:00", "soon",
    "application/x-gzip", "pickle", "application/x-python-serialize", "base64", "utf-16",
    [], {}, [None], [[]], {"": None}, {"__type__": "datetime", "__value__": "x"}, {"task": 5}, ["a", 1],
    {"__type__": "sutra.vectors", "__value__": {}}, [{"task": "x", "args": 1}],
    {"v": 1, "texts": 10**30},
)  # fmt: skip
SHARES: Final = {"embed": 60, "device": 20, "control": 8, "distill": 6, "part": 3, "combine": 3}
MOST_CHANGES: Final = 3
BOMB_BYTES: Final = 512 << 20
DEPTH: Final = 50_000


@dataclass(frozen=True, slots=True)
class FuzzedMessage:
    """One message.

    Attributes:
        queue: where it goes.
        raw: its bytes.
        id: under which its sender waits; None: it has none that can be read.
        changes: what was done to it.
    """

    queue: str
    raw: bytes
    id: str | None
    changes: tuple[str, ...]


class Fuzzer:
    """A seeded source of messages."""

    def __init__(self, seed: int, device_ids: list[str]) -> None:
        """Begin.

        Args:
            seed: the same seed gives the same changes.
            device_ids: devices whose queues get messages as well.
        """
        self._random = random.Random(seed)  # noqa: S311 - it only chooses changes
        self._devices = device_ids
        self._bomb = base64.b64encode(zlib.compress(b" " * BOMB_BYTES)).decode()

    def messages(self, count: int) -> Iterator[FuzzedMessage]:
        """Yield so many messages."""
        kinds, weights = list(SHARES), list(SHARES.values())
        for kind in self._random.choices(kinds, weights, k=count):
            yield self._message(kind)

    def valid_messages(self, count: int) -> Iterator[FuzzedMessage]:
        """Yield so many messages of calls, unchanged: what the changed ones are compared with."""
        for _ in range(count):
            queue, message = self._valid("embed")
            body = json.dumps(message.pop("_body")).encode()
            message["body"] = base64.b64encode(body).decode()
            yield FuzzedMessage(queue, json.dumps(message).encode(), _named(message), ())

    def _message(self, kind: str) -> FuzzedMessage:
        queue, message = self._valid(kind)
        changes = [self._change(message) for _ in range(self._random.randint(1, MOST_CHANGES))]
        body = message.pop("_body", None)
        if "body" not in message and body is not None:
            text = json.dumps(body).encode()
            message["body"] = base64.b64encode(text).decode()
        raw = json.dumps(message).encode()
        named = _named(message)
        if self._random.random() < 0.08:
            raw, change = self._damaged(raw)
            changes.append(change)
            try:
                named = _named(json.loads(raw))
            except (ValueError, RecursionError):
                named = None
        return FuzzedMessage(queue, raw, named, tuple(changes))

    def _valid(self, kind: str) -> tuple[str, dict[str, Any]]:
        body: list[Any] = [[], {}, {}]
        queue, task = keys.EMBED_QUEUE, keys.EMBED_TASK
        if kind in ("embed", "device"):
            callbacks: dict[str, Any] = dict.fromkeys(("callbacks", "errbacks", "chain", "chord"))
            if self._random.random() < 0.3:
                callbacks["errbacks"] = [json.loads(json.dumps(dict(embed.s("told"))))]
            if self._random.random() < 0.2:
                callbacks["callbacks"] = [json.loads(json.dumps(dict(embed.si("then"))))]
            body = [["a text"], {"normalize": True}, callbacks]
            if kind == "device":
                queue = keys.device_queue(self._random.choice(self._devices))
        elif kind == "control":
            queue, task = keys.CONTROL_QUEUE, self._random.choice([keys.HEALTH_TASK, keys.MEMORY_TASK])
        elif kind == "distill":
            queue, task, body = keys.DISTILL_QUEUE, keys.DISTILL_TASK, [[{}], {}, {}]
        else:
            task = keys.PART_TASK if kind == "part" else keys.COMBINE_TASK
        task_id = str(uuid.UUID(int=self._random.getrandbits(128)))
        made = app.amqp.as_task_v2(task_id, task)
        headers = {**made.headers, "sutra": {"v": 1, "texts": 1, "bytes": 6, "sent_at": None}}
        properties = {
            "correlation_id": task_id,
            "reply_to": str(uuid.UUID(int=self._random.getrandbits(128))),
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": queue},
            "priority": 0,
            "body_encoding": "base64",
            "delivery_tag": str(uuid.UUID(int=self._random.getrandbits(128))),
        }
        return queue, {
            "_body": body,
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": headers,
            "properties": properties,
        }

    def _change(self, message: dict[str, Any]) -> str:
        """Change one place of a message; return what was done."""
        special: tuple[Callable[[dict[str, Any]], str], ...] = (
            self._bombed, self._wrongly_compressed, self._deep, self._large,
        )  # fmt: skip
        if self._random.random() < 0.06:
            return self._random.choice(special)(message)
        path, container, key = self._random.choice(list(_places(message)))
        action = self._random.choice(("replace", "replace", "delete", "wrap", "rename"))
        if action == "delete":
            del container[key]
        elif action == "wrap":
            container[key] = [container[key]]
        elif action == "rename" and isinstance(container, dict):
            container[f"{key}x"] = container.pop(key)
        else:
            container[key] = self._random.choice(ODD_VALUES)
        return f"{action} {path}"

    def _bombed(self, message: dict[str, Any]) -> str:
        _headers(message)["compression"] = "application/x-gzip"
        message["body"] = self._bomb
        return "bomb"

    def _wrongly_compressed(self, message: dict[str, Any]) -> str:
        _headers(message)["compression"] = self._random.choice(
            ["application/x-bz2", "application/x-gzip", "application/x-lzma", "zstd", "none", "x" * 99]
        )
        compressed = bz2.compress(b'[["a"], {}, {}]')
        message["body"] = base64.b64encode(compressed[: self._random.randint(0, 60)]).decode()
        return "wrongly compressed"

    def _deep(self, message: dict[str, Any]) -> str:
        message["body"] = base64.b64encode(b"[" * DEPTH + b"]" * DEPTH).decode()
        return "deep"

    def _large(self, message: dict[str, Any]) -> str:
        message["_body"] = [["word " * 400_000], {}, {}]
        return "large"

    def _damaged(self, raw: bytes) -> tuple[bytes, str]:
        at = self._random.randrange(len(raw))
        damages: tuple[tuple[bytes, str], ...] = (
            (raw[:at], "cut"),
            (raw[:at] + b"\xff\x00" + raw[at + 1 :], "bytes"),
            (b"[" * DEPTH, "open brackets"),
            (b"", "empty"),
            (b"null", "null"),
            (raw + raw, "twice"),
        )
        return self._random.choice(damages)


def _headers(message: dict[str, Any]) -> dict[str, Any]:
    headers = message.get("headers")
    if not isinstance(headers, dict):
        headers = message["headers"] = {}
    return headers


def _places(node: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield every place in a tree: its path, and the container and key that lead to it."""
    pairs: Any = ()
    if isinstance(node, dict):
        pairs = list(node.items())
    elif isinstance(node, list):
        pairs = list(enumerate(node))
    for key, value in pairs:
        place = f"{path}.{key}" if path else str(key)
        yield place, node, key
        yield from _places(value, place)


def _named(message: Any) -> str | None:
    """Return the id under which a sender of this message waits."""
    if not isinstance(message, dict):
        return None
    for part, name in (("headers", "id"), ("properties", "correlation_id")):
        holder = message.get(part)
        value = holder.get(name) if isinstance(holder, dict) else None
        text = str(value) if type(value) is int else value
        if isinstance(text, str) and 0 < len(text) < 256 and text.isprintable():
            return text
        if isinstance(text, str) and 0 < len(text) < 256 and "\ud800" not in text:
            return text
    return None
