"""Messages that were given up, kept for a person to look at: ``sutra dead-letters``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from sutra_tasks import keys, lua
from sutra_tasks.broker.queues import lane
from sutra_tasks.broker.requeue import ATTEMPTS

if TYPE_CHECKING:
    import redis

    from sutra_tasks.errors import PoisonMessageError

__all__ = ["DeadLetter", "bury", "dead_letters", "drop", "retry"]

VERSION: Final = 1

RETRY_DEAD_LETTER: Final = lua.script("broker/retry_dead_letter")


@dataclass(frozen=True, slots=True, repr=False)
class DeadLetter:
    """A message given up. Its ``message`` holds texts: show the other fields."""

    task_id: str
    reason: str
    attempts: int
    at: float
    message: str


def bury(
    client: redis.Redis, task_id: str, raw: bytes, error: PoisonMessageError, *, now: float
) -> None:
    """Keep a message, under its task's id; ``now`` is Unix time in seconds."""
    letter = DeadLetter(task_id, error.reason, error.attempts, now, raw.decode())
    client.hset(keys.DEAD_LETTERS, task_id, json.dumps({"v": VERSION, **asdict(letter)}))


def dead_letters(client: redis.Redis) -> list[DeadLetter]:
    """Return all that were given up, the oldest first."""
    found: Any = client.hgetall(keys.DEAD_LETTERS)
    values = [json.loads(text) for text in found.values()]
    letters = [
        DeadLetter(**{name: value[name] for name in DeadLetter.__slots__})
        for value in values
        if value.get("v") == VERSION
    ]
    return sorted(letters, key=lambda letter: letter.at)


def retry(client: redis.Redis, letters: Sequence[DeadLetter]) -> int:
    """Send messages again, their attempts forgotten; say how many were still there to send."""
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
    """Forget messages for good; say how many were still there."""
    names = [letter.task_id for letter in letters]
    return int(client.hdel(keys.DEAD_LETTERS, *names)) if names else 0
