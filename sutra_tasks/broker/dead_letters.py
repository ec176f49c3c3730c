"""Dead letters: messages that were given up, kept for a person to decide (``sutra dead-letters``)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from sutra_tasks import keys, lua
from sutra_tasks.broker.attempts import ATTEMPTS
from sutra_tasks.broker.queues import lane, priority_of

if TYPE_CHECKING:
    import redis

__all__ = ["DeadLetter", "add_dead_letter", "dead_letters", "drop", "retry"]

VERSION: Final = 1

RETRY_DEAD_LETTER: Final = lua.script("broker/retry_dead_letter")


@dataclass(frozen=True, slots=True, repr=False)
class DeadLetter:
    """A message that was given up, with its reason.

    Attributes:
        task_id: its task.
        reason: why it was given up.
        attempts: workers that died or failed with it.
        at: Unix time in seconds.
        message: the message; it has texts in it, so show the other fields only.
    """

    task_id: str
    reason: str
    attempts: int
    at: float
    message: str


def add_dead_letter(
    client: redis.Redis, task_id: str, raw: bytes, *, reason: str, attempts: int, now: float
) -> None:
    """Keep a message that is given up; a second time replaces the first.

    Args:
        client: the server with the queues.
        task_id: its task, or a name for a message without one.
        raw: the message, as it was taken; bytes that are not UTF-8 come back unchanged.
        reason: why it is given up.
        attempts: workers that died or failed with it.
        now: Unix time in seconds.
    """
    letter = DeadLetter(task_id, reason, attempts, now, raw.decode("utf-8", "surrogateescape"))
    client.hset(keys.dead_letters(), task_id, json.dumps({"v": VERSION, **asdict(letter)}))


def dead_letters(client: redis.Redis) -> list[DeadLetter]:
    """Return all dead letters, the oldest first; those of another version are left out."""
    found: Any = client.hgetall(keys.dead_letters())
    values = [json.loads(text) for text in found.values()]
    letters = [
        DeadLetter(**{name: value[name] for name in DeadLetter.__slots__})
        for value in values
        if value.get("v") == VERSION
    ]
    return sorted(letters, key=lambda letter: letter.at)


def retry(client: redis.Redis, letters: Sequence[DeadLetter]) -> int:
    """Send messages again, without their attempts; return how many were still there.

    One that is no message is refused again, and becomes the same dead letter.
    """
    sent = 0
    for letter in letters:
        message, priority = _without_attempts(letter.message)
        queue = lane(keys.EMBED_QUEUE, priority)
        sent += RETRY_DEAD_LETTER(
            client,
            dead_letters=keys.dead_letters(),
            target=queue,
            task_id=letter.task_id,
            message=message,
        )
    return sent


def _without_attempts(text: str) -> tuple[bytes, int]:
    """Return a message as it is sent again, and its priority."""
    try:
        message: dict[str, Any] = json.loads(text)
        message["headers"].pop(ATTEMPTS, None)
        return json.dumps(message).encode(), priority_of(message["properties"])
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        return text.encode("utf-8", "surrogateescape"), 0


def drop(client: redis.Redis, letters: Sequence[DeadLetter]) -> int:
    """Delete dead letters for good; return how many were still there."""
    names = [letter.task_id for letter in letters]
    return int(client.hdel(keys.dead_letters(), *names)) if names else 0
