"""Messages a worker process has taken and not finished, in one Redis list a process.

Taking a message moves it from its queue to this list in one step, so there is no moment in which a
killed process takes it along. The list is named by *incarnation* (device and start), not by device:
a restarted worker must not mistake its predecessor's work for its own.
"""

from __future__ import annotations

import json
import secrets
from collections import deque
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from kombu.transport.redis import PRIORITY_STEPS
from kombu.transport.redis import Channel as StockChannel

from sutra_tasks import keys

if TYPE_CHECKING:
    import redis

__all__ = ["HeldMessages", "give_back_all", "held_by", "lane", "lanes", "new_incarnation"]

FORWARD: Final = """
local moved = 0
for i, message in ipairs(ARGV) do
  if redis.call('LREM', KEYS[1], 1, message) == 1 then
    redis.call('LPUSH', KEYS[i + 1], message)
    moved = moved + 1
  end
end
return moved
"""
"""KEYS: the held list, then a destination for each message. ARGV: the messages, untouched.
A message no longer held was given back meanwhile, and belongs to somebody else."""

GIVE_BACK: Final = """
if redis.call('LREM', KEYS[1], 1, ARGV[1]) == 1 then
  redis.call('RPUSH', KEYS[2], ARGV[2])
  return 1
end
return 0
"""
"""KEYS: the held list, the queue. ARGV: the message as held, the message marked as redelivered.
It goes to the end that is taken from next."""


def new_incarnation(worker: str) -> str:
    """Name one start of ``worker``."""
    return f"{worker}.{secrets.token_hex(4)}"


def lane(queue: str, priority: int) -> str:
    """Return the Redis list of ``queue`` that holds messages of ``priority`` (0 goes first)."""
    step = max(step for step in PRIORITY_STEPS if step <= max(0, min(priority, 9)))
    return f"{queue}{StockChannel.sep}{step}" if step else queue


def lanes(queue: str) -> list[str]:
    """Return all lists of ``queue``, the first served first."""
    return [lane(queue, step) for step in PRIORITY_STEPS]


def _redelivered(raw: bytes) -> tuple[str, str]:
    """Return the list a held message goes back to, and the message marked as redelivered.

    Its routing key is the queue its sender chose, even after the router passed it on to a device,
    so what a device gives back is routed afresh.
    """
    message: dict[str, Any] = json.loads(raw)
    properties = message["properties"]
    info = properties["delivery_info"]
    message.setdefault("headers", {})["redelivered"] = True
    info["redelivered"] = True
    priority = properties.get("priority")
    return lane(info["routing_key"], priority if isinstance(priority, int) else 0), json.dumps(
        message
    )


def give_back_all(client: redis.Redis, incarnation: str) -> int:
    """Return everything ``incarnation`` holds to its queues; call it when that process is gone.

    Each message moves in one step, so two callers, or one killed half-way, lose and double nothing.
    """
    held = keys.held(incarnation)
    # The newest is at the head: giving it back first leaves the oldest next in line.
    messages: list[bytes] = client.lrange(held, 0, -1)
    given = 0
    for raw in messages:
        queue, marked = _redelivered(raw)
        given += int(client.eval(GIVE_BACK, 2, held, queue, raw, marked))
    return given


@cache
def held_by(incarnation: str) -> HeldMessages:
    """Return the one object of this process for what ``incarnation`` holds."""
    return HeldMessages(incarnation)


class HeldMessages:
    """What this process holds. One a process; its channels come and go with the connection.

    ``finish`` and ``give_back`` may be called from any thread, also while the server is away: what
    could not be told to the server is told at the next :meth:`flush`.
    """

    def __init__(self, incarnation: str) -> None:
        self.incarnation = incarnation
        self.key = keys.held(incarnation)
        self._finished: deque[bytes] = deque()
        self._forwarded: list[tuple[bytes, str]] = []

    def finish(self, raw: bytes) -> None:
        """Note that a message is done with; :meth:`flush` removes it from the server."""
        self._finished.append(raw)

    def forward(self, raw: bytes, queue: str, priority: int) -> None:
        """Note where a message goes instead; :meth:`flush` moves it, untouched, in one step."""
        self._forwarded.append((raw, lane(queue, priority)))

    def give_back(self, client: redis.Redis, raw: bytes) -> None:
        """Return one message to its queue now."""
        queue, marked = _redelivered(raw)
        client.eval(GIVE_BACK, 2, self.key, queue, raw, marked)

    def flush(self, client: redis.Redis) -> None:
        """Tell the server what was finished and forwarded, in one round trip."""
        finished = [self._finished.popleft() for _ in range(len(self._finished))]
        forwarded, self._forwarded = self._forwarded, []
        if not finished and not forwarded:
            return
        try:
            with client.pipeline(transaction=False) as pipe:
                for raw in finished:
                    pipe.lrem(self.key, 1, raw)  # type: ignore[arg-type]  # bytes are fine
                if forwarded:
                    messages = [raw for raw, _ in forwarded]
                    queues = [queue for _, queue in forwarded]
                    pipe.eval(FORWARD, 1 + len(queues), self.key, *queues, *messages)
                pipe.execute()
        except Exception:
            # Said again at the next flush; both are safe to repeat.
            self._finished.extendleft(reversed(finished))
            self._forwarded[:0] = forwarded
            raise

    def reclaim(self, client: redis.Redis) -> int:
        """Return everything held, but what is finished, to its queues: nobody works on it here.

        For a new connection, whose consumer knows nothing of the old one's deliveries, and for the
        end of a worker. A thread that still computes such a message finishes it; both runs store the
        same vectors.
        """
        self._forwarded.clear()
        self.flush(client)
        return give_back_all(client, self.incarnation)
