"""Messages a worker process has taken and not finished, in one Redis list a process.

Taking a message moves it from its queue to this list in one step, so there is no moment in which a
killed process takes it along. The list is named by *incarnation* (device and start), not by device:
a restarted worker must not mistake its predecessor's work for its own.
"""

from __future__ import annotations

import json
import secrets
from bisect import bisect_right
from collections import deque
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from celery.utils.log import get_logger
from kombu.transport.redis import PRIORITY_STEPS
from kombu.transport.redis import Channel as StockChannel

from sutra_tasks import keys

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    import redis

    Command = tuple[str | bytes | int, ...]

__all__ = ["HeldMessages", "give_back_all", "held_by", "home", "lane", "lanes", "new_incarnation"]

logger = get_logger(__name__)

SETTLE_AND_TAKE: Final = """#!lua flags=allow-oom
local finished, forwarded = tonumber(ARGV[1]), tonumber(ARGV[2])
local room, most_bytes = tonumber(ARGV[3]), tonumber(ARGV[4])
for i = 5, 4 + finished do
  redis.call('LREM', KEYS[1], 1, ARGV[i])
end
for i = 1, forwarded do
  local message = ARGV[4 + finished + i]
  if redis.call('LREM', KEYS[1], 1, message) == 1 then
    redis.call('LPUSH', KEYS[1 + i], message)
  end
end
local taken, bytes = {}, 0
for i = 2 + forwarded, #KEYS do
  while #taken < 2 * room and bytes < most_bytes do
    local message = redis.call('LMOVE', KEYS[i], KEYS[1], 'RIGHT', 'LEFT')
    if not message then break end
    taken[#taken + 1] = KEYS[i]
    taken[#taken + 1] = message
    bytes = bytes + #message
  end
end
return taken
"""
"""All a worker has to tell and to ask, in one round trip.

KEYS: the held list; a destination for each forwarded message; the lists to take from, first served
first. ARGV: how many messages are finished and forwarded; messages and bytes to stop taking at; the
finished messages; the forwarded ones, as they were taken. A message that is no longer held was given
back meanwhile and belongs to somebody else: it is not forwarded. Returns list name and message,
alternating.

Allowed on a full server: it moves messages and frees them, so refusing it would keep the server full.
"""

GIVE_BACK: Final = """#!lua flags=allow-oom
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


@cache
def lanes(queue: str) -> tuple[str, ...]:
    """Return all lists of ``queue``, the first served first."""
    return tuple(f"{queue}{StockChannel.sep}{step}" if step else queue for step in PRIORITY_STEPS)


def lane(queue: str, priority: int) -> str:
    """Return the Redis list of ``queue`` that holds messages of ``priority`` (0 goes first)."""
    return lanes(queue)[bisect_right(PRIORITY_STEPS, max(0, min(priority, 9))) - 1]


def home(queue: str) -> str:
    """Return where a message taken from ``queue`` goes back to: a device's are routed afresh."""
    return keys.EMBED_QUEUE if queue.startswith(keys.DEVICE_QUEUE_PREFIX) else queue


def _redelivered(raw: bytes) -> tuple[int, str] | None:
    """Return a held message's priority, and the message marked as redelivered.

    None for bytes that are no Celery message: nobody could ever deliver them.
    """
    try:
        message: dict[str, Any] = json.loads(raw)
        properties = message["properties"]
        properties["delivery_info"]["redelivered"] = True
        message["headers"] = {**(message.get("headers") or {}), "redelivered": True}
    except (ValueError, KeyError, TypeError):
        return None
    try:
        priority = int(properties.get("priority") or 0)
    except (TypeError, ValueError):
        priority = 0
    return priority, json.dumps(message)


def _give_back(client: redis.Redis, held: str, queue: str, raw: bytes) -> int:
    marked = _redelivered(raw)
    if marked is None:
        logger.error("dropped %d bytes that are no message", len(raw))
        client.lrem(held, 1, raw)  # type: ignore[arg-type]  # bytes are fine
        return 0
    priority, message = marked
    return int(client.eval(GIVE_BACK, 2, held, lane(queue, priority), raw, message))


def give_back_all(
    client: redis.Redis,
    incarnation: str,
    queue: str = keys.EMBED_QUEUE,
    *,
    own: Mapping[bytes, str] = MappingProxyType({}),
    but: Collection[bytes] = (),
) -> int:
    """Return what ``incarnation`` holds to its queues, and say how many messages that were.

    Each message moves in one step, so two callers, or one killed half-way, lose and double nothing.

    Args:
        client: the server.
        incarnation: a process that is gone, or whose ``but`` names what it still works on.
        queue: where its messages belong.
        own: messages that belong elsewhere.
        but: messages that stay held.
    """
    held = keys.held(incarnation)
    # The newest is at the head: giving it back first leaves the oldest next in line.
    messages: list[bytes] = client.lrange(held, 0, -1)  # type: ignore[assignment]  # nothing decodes
    return sum(_give_back(client, held, own.get(raw, queue), raw) for raw in messages if raw not in but)


@cache
def held_by(incarnation: str) -> HeldMessages:
    """Return the one object of this process for what ``incarnation`` holds."""
    return HeldMessages(incarnation)


class HeldMessages:
    """What this process holds. One a process; its channels come and go with the connection.

    ``finish`` and ``give_back`` may be called from any thread, ``finish`` also while the server is
    away: it only takes a note, and the worker's next command tells the server. A worker killed in
    between repeats a finished task, as it may after any kill.
    """

    def __init__(self, incarnation: str) -> None:
        self.incarnation = incarnation
        self.key = keys.held(incarnation)
        self._active: dict[bytes, str] = {}
        self._abandoned: dict[bytes, str] = {}
        self._finished: deque[bytes] = deque()
        self._forwarded: deque[tuple[bytes, str]] = deque()
        self._telling: tuple[list[bytes], list[tuple[bytes, str]]] = ([], [])

    @property
    def has_news(self) -> bool:
        """Whether something is noted that the server does not know."""
        return bool(self._finished or self._forwarded)

    def delivered(self, raw: bytes, queue: str) -> None:
        """Note that a consumer of this process has a message, and where it goes back to."""
        self._active[raw] = queue

    def finish(self, raw: bytes) -> None:
        """Note that a message is done with."""
        self._active.pop(raw, None)
        self._abandoned.pop(raw, None)
        self._finished.append(raw)

    def forward(self, raw: bytes, queue: str, priority: int) -> None:
        """Note that a message goes to another queue instead, exactly as it came."""
        self._active.pop(raw, None)
        self._forwarded.append((raw, lane(queue, priority)))

    def abandon(self, raw: bytes) -> None:
        """Note that the consumer that had a message is gone; :meth:`reclaim` returns it."""
        if queue := self._active.pop(raw, None):
            self._abandoned[raw] = queue

    def take_command(self, lists: Sequence[str], *, room: int, most_bytes: int) -> Command:
        """Return the command that tells the server what was noted, and takes from ``lists``.

        What it tells stays noted until :meth:`told`, because an answer may never come; the script does
        no harm when it is told twice.
        """
        self._telling = (
            [self._finished.popleft() for _ in range(len(self._finished))],
            [self._forwarded.popleft() for _ in range(len(self._forwarded))],
        )
        finished, forwarded = self._telling
        names = [self.key, *(queue for _, queue in forwarded), *lists]
        counts = (len(finished), len(forwarded), room, most_bytes)
        messages = [*finished, *(raw for raw, _ in forwarded)]
        return ("EVAL", SETTLE_AND_TAKE, len(names), *names, *counts, *messages)

    def told(self) -> None:
        """Forget what the last command told: the server has answered it."""
        self._telling = ([], [])

    def not_told(self) -> None:
        """Note again what the last command should have told: no answer came."""
        finished, forwarded = self._telling
        self._finished.extendleft(reversed(finished))
        self._forwarded.extendleft(reversed(forwarded))
        self.told()

    def give_back(self, client: redis.Redis, raw: bytes, queue: str) -> None:
        """Return one message to ``queue`` now."""
        self._active.pop(raw, None)
        _give_back(client, self.key, queue, raw)

    def reclaim(self, client: redis.Redis, queue: str) -> int:
        """Return what is held and nobody here has: neither a consumer nor a note.

        What a consumer had goes back to its own queue; what was taken and never heard of, to ``queue``.

        For the end of a connection, and again for the start of the next, if the server was away. A
        thread that still computes such a message finishes it; both runs store the same vectors.
        """
        self.not_told()
        if self.has_news:
            command = self.take_command((), room=0, most_bytes=0)
            try:
                client.execute_command(*command)  # type: ignore[no-untyped-call]
            except BaseException:
                self.not_told()
                raise
            self.told()
        own, self._abandoned = self._abandoned, {}
        try:
            return give_back_all(client, self.incarnation, queue, own=own, but=self._active)
        except BaseException:
            self._abandoned |= own
            raise
