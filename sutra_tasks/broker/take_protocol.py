"""Which commands take messages, and what their answers mean; without a socket and without a clock.

The script ``take.lua`` acknowledges, forwards and takes in one round trip. Once all queues are empty, a
worker waits with ``BLMOVE`` on its first list, which is answered as soon as a message comes, and looks
into the other lists every :data:`IDLE_WAIT_S`. Both may be on their way at once, the script first.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Final

from redis.exceptions import NoScriptError

from sutra_tasks.broker.queues import lanes, queue_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sutra_tasks.broker.in_flight import InFlightMessages

__all__ = ["TakeProtocol", "Taken"]

MOST_MESSAGES: Final = 16
"""Messages that one command takes at most."""

MOST_BYTES: Final = 1 << 20
"""Bytes after which one command takes no more."""

REFUSED_PAUSE_S: Final = 0.5
"""Seconds without a command after the server refused one, because its memory is full, say."""

BACKWARDS_EVERY: Final = 8
"""One take in this many begins with the last priority, which urgent messages would starve otherwise."""

IDLE_WAIT_S: Final = 0.1
"""Seconds for which an idle worker waits on its first list before it looks into the others."""


@dataclass(frozen=True, slots=True, repr=False)
class Taken:
    """A message, as it was taken, and its queue."""

    queue: str
    raw: bytes


class _Sent(Enum):
    """A command whose answer is awaited."""

    TAKE = auto()
    ACKNOWLEDGE = auto()
    WAIT = auto()


class TakeProtocol:
    """What one channel sends to the server to take messages, and what it awaits.

    ``now`` is monotonic seconds.
    """

    def __init__(self, in_flight: InFlightMessages) -> None:
        self.idle = False
        """Whether the queues are taken to be empty, so that the next command waits on the first list."""
        self._in_flight = in_flight
        self._awaited: deque[_Sent] = deque()
        self._wait_list = ""
        self._takes = 0
        self._looked_at = -float("inf")
        self._paused_until = -float("inf")
        self._script_missing = False

    @property
    def awaits_answer(self) -> bool:
        """Whether the server has yet to answer a command."""
        return bool(self._awaited)

    @property
    def waits(self) -> bool:
        """Whether the last command lets the server wait for a message. Safe from any thread."""
        return _Sent.WAIT in self._awaited

    def commands(
        self, queues: Sequence[str], *, most_messages: int | None, now: float
    ) -> list[tuple[Any, ...]]:
        """Return the commands to send now, and await their answers.

        Args:
            queues: queues to take from, the first served first.
            most_messages: messages that the channel may have in addition, at least 1; None: any number.
            now: the time.
        """
        if now < self._paused_until:
            return []
        queues = [queue for queue in queues if self._in_flight.may_take(queue)]
        pending = self._in_flight.has_pending
        if not queues:
            return [self._take((), 0)] if pending else []
        sources = [name for lane in zip(*map(lanes, queues), strict=True) for name in lane]
        most = min(most_messages or MOST_MESSAGES, MOST_MESSAGES)
        waits = self.idle and (most > 1 or not pending)
        commands = []
        if pending or not waits:
            self._takes += 1
            turn = -1 if self._takes % BACKWARDS_EVERY == 0 else 1
            commands.append(self._take(sources[::turn], most - waits))
        if waits:
            self._awaited.append(_Sent.WAIT)
            self._wait_list = sources[0]
            commands.append(("BLMOVE", sources[0], self._in_flight.key, "RIGHT", "LEFT", IDLE_WAIT_S))
        return commands

    def answered(self, answer: Any, now: float) -> list[Taken]:
        """Take the next answer, and return the messages it brings."""
        sent = self._awaited.popleft()
        if sent is _Sent.WAIT:
            # While messages come one by one, waiting gets each at once; the other lists have their turn.
            self.idle = answer is not None and now - self._looked_at < IDLE_WAIT_S
            return [] if answer is None else [Taken(queue_of(self._wait_list), answer)]
        self._in_flight.take_answered()
        self._script_missing = False
        if sent is _Sent.TAKE:
            self._looked_at, self.idle = now, not answer
        pairs = zip(answer[::2], answer[1::2], strict=True)
        return [Taken(queue_of(source.decode()), raw) for source, raw in pairs]

    def refused(self, error: Exception, now: float) -> float:
        """Take an error for the next answer; return for how many seconds no command is sent.

        Nothing is lost: what the command carried is sent again. A server that was restarted, or whose
        scripts were flushed, gets the whole script with the next command, at once.
        """
        sent = self._awaited.popleft()
        if sent is not _Sent.WAIT:
            self._in_flight.take_lost()
        if sent is _Sent.TAKE:
            self._takes -= 1  # nothing was taken: the next command has the same turn
        self.idle = False
        if isinstance(error, NoScriptError):
            self._script_missing = True
            return 0.0
        self._paused_until = now + REFUSED_PAUSE_S
        return REFUSED_PAUSE_S

    def connection_lost(self) -> None:
        """Await no answers any more; what the commands carried is sent again."""
        self._awaited.clear()
        self._in_flight.take_lost()

    def _take(self, sources: Sequence[str], most_messages: int) -> tuple[Any, ...]:
        self._awaited.append(_Sent.TAKE if sources else _Sent.ACKNOWLEDGE)
        return self._in_flight.take_command(
            sources,
            most_messages=most_messages,
            most_bytes=MOST_BYTES,
            with_text=self._script_missing,
        )
