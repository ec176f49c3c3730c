"""Dead letters: messages that were given up, kept for a person to decide (``sutra dead-letters``)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from sutra_tasks import keys, lua
from sutra_tasks.broker.attempts import ATTEMPTS
from sutra_tasks.broker.queues import lane

if TYPE_CHECKING:
    import redis

    from sutra_tasks.errors import PoisonMessageError

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
    client: redis.Redis, task_id: str, raw: bytes, error: PoisonMessageError, *, now: float
) -> None:
    """Keep a message that is given up; a second time replaces the first.

    Args:
        client: the server with the queues.
        task_id: its task.
        raw: the message, as it was taken.
        error: why it is given up.
        now: Unix time in seconds.
    """
    letter = DeadLetter(task_id, error.reason, error.attempts, now, raw.decode())
    client.hset(keys.DEAD_LETTERS, task_id, json.dumps({"v": VERSION, **asdict(letter)}))


def dead_letters(client: redis.Redis) -> list[DeadLetter]:
    """Return all dead letters, the oldest first; those of another version are left out."""
    found: Any = client.hgetall(keys.DEAD_LETTERS)
    values = [json.loads(text) for text in found.values()]
    letters = [
        DeadLetter(**{name: value[name] for name in DeadLetter.__slots__})
        for value in values
        if value.get("v") == VERSION
    ]
    return sorted(letters, key=lambda letter: letter.at)


def retry(client: redis.Redis, letters: Sequence[DeadLetter]) -> int:
    """Send messages again, without their attempts; return how many were still there."""
    sent = 0
    for letter in letters:
        message: dict[str, Any] = json.loads(letter.message)
        message["headers"].pop(ATTEMPTS, None)
        queue = lane(keys.EMBED_QUEUE, int(message["properties"].get("priority") or 0))
        sent += RETRY_DEAD_LETTER(
            client,
            dead_letters=keys.DEAD_LETTERS,
            target=queue,
            task_id=letter.task_id,
            message=json.dumps(message),
        )
    return sent


def drop(client: redis.Redis, letters: Sequence[DeadLetter]) -> int:
    """Delete dead letters for good; return how many were still there."""
    names = [letter.task_id for letter in letters]
    return int(client.hdel(keys.DEAD_LETTERS, *names)) if names else 0
