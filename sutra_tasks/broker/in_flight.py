"""Messages a worker process has taken and not finished, in one Redis list a process.

Taking a message moves it from its queue to this list in one step, so there is no moment in which a
killed process takes it along. The list is named by *incarnation* (device and start), not by device:
a restarted worker must not mistake its predecessor's work for its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Final

from sutra_tasks import keys
from sutra_tasks.broker.queues import MOST_CREDIT, device_of, lane
from sutra_tasks.broker.requeue import give_back, give_back_all, load_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import redis

    Command = tuple[str | bytes | int, ...]
    Finished = tuple[bytes, int]  # and its weight
    Forwarded = tuple[bytes, str, str, int]  # where to, to whose load, and its weight

__all__ = ["HeldMessages", "held_by"]

SETTLE_AND_TAKE: Final = """#!lua flags=allow-oom
local finished, forwarded = tonumber(ARGV[1]), tonumber(ARGV[2])
local room, most_bytes = tonumber(ARGV[3]), tonumber(ARGV[4])
local at, messages, tokens, credit = 4, 0, 0, 0
for _ = 1, finished do
  local weight = tonumber(ARGV[at + 2])
  if redis.call('LREM', KEYS[1], 1, ARGV[at + 1]) == 1 and weight > 0 then
    messages, tokens = messages + 1, tokens + weight
    credit = credit + math.min(weight, MOST_CREDIT)
  end
  at = at + 2
end
if messages > 0 and redis.call('EXISTS', KEYS[2]) == 1 then
  redis.call('HINCRBY', KEYS[2], 'messages', -messages)
  redis.call('HINCRBY', KEYS[2], 'credit', -credit)
  redis.call('HINCRBY', KEYS[2], 'tokens_completed', tokens)
end
for i = 1, forwarded do
  if redis.call('LREM', KEYS[1], 1, ARGV[at + 1]) == 1 then
    redis.call('LPUSH', KEYS[1 + 2 * i], ARGV[at + 1])
    local weight, load = tonumber(ARGV[at + 2]), KEYS[2 + 2 * i]
    if weight > 0 then
      redis.call('HINCRBY', load, 'messages', 1)
      redis.call('HINCRBY', load, 'credit', math.min(weight, MOST_CREDIT))
      if redis.call('HINCRBY', load, 'tokens_dispatched', weight) == weight then
        redis.call('EXPIRE', load, FORGET_AFTER_S)
      end
    end
  end
  at = at + 2
end
local taken, bytes = {}, 0
for i = 3 + 2 * forwarded, #KEYS do
  while #taken < 2 * room and bytes < most_bytes do
    local message = redis.call('LMOVE', KEYS[i], KEYS[1], 'RIGHT', 'LEFT')
    if not message then break end
    taken[#taken + 1] = KEYS[i]
    taken[#taken + 1] = message
    bytes = bytes + #message
  end
end
return taken
""".replace("MOST_CREDIT", str(MOST_CREDIT)).replace("FORGET_AFTER_S", str(keys.FORGET_AFTER_S))
"""All a worker has to tell and to ask, in one round trip.

KEYS: the held list; the load of its own device; a destination and that device's load for each forwarded
message; the lists to take from, first served first. ARGV: how many messages are finished and forwarded;
messages and bytes to stop taking at; the finished messages, then the forwarded ones as they were taken,
each followed by its weight in tokens. A message that is no longer held was given back meanwhile and
belongs to somebody else: it is neither forwarded nor counted. Returns list name and message in turn.

Loads are counted here, in the step that moves the message, so a backlog cannot drift.

Allowed on a full server: it moves messages and frees them, so refusing it would keep the server full.
"""


@cache
def held_by(incarnation: str) -> HeldMessages:
    """Return the one object of this process for what ``incarnation`` holds."""
    return HeldMessages(incarnation)


@dataclass(frozen=True, slots=True)
class _Delivery:
    """A message some consumer of this process has."""

    queue: str
    tokens: int
    weight: int


_UNKNOWN: Final = _Delivery("", 0, 0)


class HeldMessages:
    """What this process holds. One a process; its channels come and go with the connection.

    ``finish`` and ``give_back`` may be called from any thread, ``finish`` also while the server is
    away: it only takes a note, and the worker's next command tells the server. A worker killed in
    between repeats a finished task, as it may after any kill.
    """

    def __init__(self, incarnation: str) -> None:
        self.incarnation = incarnation
        self.key = keys.held(incarnation)
        self.may_take: Callable[[str], bool] = lambda _: True
        """Asked before each take: whether this process has room for more work of a queue."""
        self._load = load_of(incarnation)
        self._counts = device_of(incarnation) is not None
        self._active: dict[bytes, _Delivery] = {}
        self._abandoned: dict[bytes, _Delivery] = {}
        self._finished: deque[Finished] = deque()
        self._forwarded: deque[Forwarded] = deque()
        self._telling: tuple[list[Finished], list[Forwarded]] = ([], [])

    @property
    def has_news(self) -> bool:
        """Whether something is noted that the server does not know."""
        return bool(self._finished or self._forwarded)

    @property
    def credit(self) -> int:
        """Credit that uses what consumers of this process have."""
        return sum(min(one.tokens, MOST_CREDIT) for one in list(self._active.values()))

    @property
    def uncounted(self) -> tuple[int, int]:
        """Messages, and their tokens, that came past the router and so are in nobody's load."""
        past = [one.tokens for one in list(self._active.values()) if not one.weight]
        return len(past), sum(past)

    def delivered(self, raw: bytes, queue: str, *, tokens: int = 0, weight: int = 0) -> None:
        """Note that a consumer of this process has a message, where it goes back to, and its size."""
        self._active[raw] = _Delivery(queue, tokens, weight if self._counts else 0)

    def finish(self, raw: bytes) -> None:
        """Note that a message is done with."""
        had = self._active.pop(raw, None) or self._abandoned.pop(raw, None) or _UNKNOWN
        self._finished.append((raw, had.weight))

    def forward(self, raw: bytes, queue: str, priority: int, *, load: str, weight: int) -> None:
        """Note that a message goes to another queue instead, exactly as it came, and to whose load."""
        self._active.pop(raw, None)
        self._forwarded.append((raw, lane(queue, priority), load, weight))

    def abandon(self, raw: bytes) -> None:
        """Note that the consumer that had a message is gone; :meth:`reclaim` returns it."""
        if had := self._active.pop(raw, None):
            self._abandoned[raw] = had

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
        places = [name for _, destination, load, _ in forwarded for name in (destination, load)]
        names = [self.key, self._load, *places, *lists]
        news: list[bytes | int] = [fact for one in finished for fact in one]
        for raw, _, _, weight in forwarded:
            news += (raw, weight)
        counts = (len(finished), len(forwarded), room, most_bytes)
        return ("EVAL", SETTLE_AND_TAKE, len(names), *names, *counts, *news)

    def told(self) -> None:
        """Forget what the last command told: the server has answered it."""
        self._telling = ([], [])

    def not_told(self) -> None:
        """Note again what the last command should have told: no answer came."""
        finished, forwarded = self._telling
        self._finished.extendleft(reversed(finished))
        self._forwarded.extendleft(reversed(forwarded))
        self.told()

    def give_back(self, client: redis.Redis, raw: bytes, queue: str, *, failed: bool = False) -> None:
        """Return one message to ``queue`` now; ``failed`` counts it as an attempt.

        Where that fails, :meth:`reclaim` returns it.
        """
        had = self._active.pop(raw, _UNKNOWN)
        try:
            give_back(client, self.incarnation, raw, queue, failed=failed)
        except BaseException:
            self._abandoned[raw] = replace(had, queue=queue)
            raise

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
        own = {raw: had.queue for raw, had in list(self._abandoned.items())}
        returned = give_back_all(client, self.incarnation, queue, own=own, but=self._active)
        for raw in own:  # only now: until then a thread may still finish it
            self._abandoned.pop(raw, None)
        return returned
