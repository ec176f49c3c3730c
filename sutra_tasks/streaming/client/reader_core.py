"""What a reader does next: fetches responses, drops repeated chunks, and acknowledges. No I/O.

Readers of one stream share its output through a consumer group. A reader that dies leaves the responses
that it did not acknowledge to the others, which claim them after a while.
"""

from __future__ import annotations

import os
import uuid
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import redis

from sutra_tasks import keys, lua
from sutra_tasks.errors import (
    BrokerNotConfiguredError,
    CorruptResultError,
    InvalidOptionError,
    StreamFaultError,
    SutraError,
    UnsupportedVersionError,
)
from sutra_tasks.settings import settings
from sutra_tasks.streaming.client.repeats import Repeats
from sutra_tasks.streaming.client.steps import (
    REPEAT_S,
    SERVER_ERRORS,
    Command,
    RunScript,
    Sleep,
    raise_if_refused,
)
from sutra_tasks.streaming.entries import check_stream
from sutra_tasks.streaming.responses import (
    StreamingError,
    StreamingResponse,
    parse_output,
    readable_ids,
)

if TYPE_CHECKING:
    from sutra_tasks.settings import Settings
    from sutra_tasks.streaming.client.steps import Steps

__all__ = ["REMEMBER", "ReaderCore"]

FETCH: Final = 16
"""Responses fetched at a time: no more are repeated if this process dies."""
BLOCK_S: Final = 1.0
"""Seconds that the server may hold back its answer until there is a response."""
CLAIM_EVERY_S: Final = 1.0
ABSENT_S: Final = 0.1
"""Seconds until a stream that does not exist is looked for again."""
REMEMBER: Final = 100_000

BEGIN: Final = lua.script("streaming/lua/begin_reading", GROUP=keys.READERS_GROUP)
ACKNOWLEDGE: Final = lua.script("streaming/lua/acknowledge_responses", GROUP=keys.READERS_GROUP)
SET_ASIDE: Final = lua.script("streaming/lua/set_aside_responses", GROUP=keys.READERS_GROUP)
REQUEUE: Final = lua.script("streaming/lua/requeue_responses", GROUP=keys.READERS_GROUP)


@dataclass(frozen=True, slots=True)
class _Given:
    """A response that the caller has and did not say to have handled.

    Attributes:
        fields: as they were fetched: the caller may have changed the vectors that it was given.
        unreadable: why the response cannot be read; None if it can.
    """

    fields: Any
    unreadable: str | None


class ReaderCore:
    """The state of one reader, and the steps of its methods.

    A response is first ``_fetched``, then ``_given`` to the caller, then ``_handled``, and then
    acknowledged and forgotten. An iteration that begins puts what is given back to what is fetched.
    """

    def __init__(
        self,
        stream: str,
        *,
        timeout_s: float | None,
        remember: int,
        claim_s: float,
        auto_acknowledge: bool,
        options: Settings | None,
        clock: Callable[[], float],
    ) -> None:
        """Check the arguments; they are :class:`StreamReader`'s."""
        self.stream = check_stream(stream)
        if remember < 0:
            raise InvalidOptionError("remember", str(remember), "0 or more")
        self.options = options or settings()
        if self.options.broker_url is None:
            raise BrokerNotConfiguredError
        self._key = keys.stream(stream, "out")
        self._timeout_s, self._claim_s, self._clock = timeout_s, claim_s, clock
        self._auto_acknowledge = auto_acknowledge
        self._process, self._name = os.getpid(), uuid.uuid4().hex
        self._fetched: deque[tuple[bytes, Any]] = deque()
        self._given: dict[bytes, _Given] = {}
        self._handled: dict[bytes, str | None] = {}
        self._repeats = Repeats(remember)
        self._claimed_at = -float("inf")
        self._is_answer_lost = False
        self._heard_at = clock()

    def begin(self) -> None:
        """Begin an iteration: what was given and not handled comes again, before anything else.

        In a forked child the reader is another one: what it had is the parent's.
        """
        if os.getpid() != self._process:
            self._process, self._name = os.getpid(), uuid.uuid4().hex
            self._fetched.clear()
            self._given, self._handled = {}, {}
        given = [(entry_id, one.fields) for entry_id, one in self._given.items()]
        self._fetched.extendleft(reversed(given))
        self._given = {}
        self._repeats.put_back()

    def next_response(self) -> Steps[StreamingResponse | StreamingError | None]:
        """Return the next response with a new chunk or an error; None: the stream was silent too long.

        Raises:
            StreamFaultError: the server refuses to read the stream.
            redis.RedisError: the server does not answer, and the timeout is over.
        """
        if self._auto_acknowledge:
            self.mark_handled()
        self._heard_at = self._clock()  # while the caller worked, the stream was not silent
        while True:
            if (found := self._next_fetched()) is not None:
                return found
            try:
                if not (yield from self._fetch()):
                    return None
            except SERVER_ERRORS as error:
                raise_if_refused(self.stream, error)
                if self._left_s() <= REPEAT_S:
                    raise  # the caller would think that the stream was silent
                yield Sleep(REPEAT_S)

    def mark_handled(self) -> None:
        """Let the responses that the caller was given be acknowledged next time."""
        self._handled |= {entry_id: one.unreadable for entry_id, one in self._given.items()}
        self._given = {}
        self._repeats.handled()

    def acknowledge(self) -> Steps[None]:
        """Acknowledge the responses that are handled; those that cannot be read become dead letters.

        Raises:
            StreamFaultError: the server refuses it.
            redis.RedisError: the server does not answer.
        """
        unreadable = {one: why for one, why in self._handled.items() if why is not None}
        others = [one for one, why in self._handled.items() if why is None]
        try:
            if others:
                yield RunScript(ACKNOWLEDGE, {"responses": self._key, "ids": others})
            if unreadable:
                values = {
                    "responses": self._key, "dead_letters": keys.stream(self.stream, "dead"),
                    "ids": list(unreadable), "reasons": list(unreadable.values()),
                }  # fmt: skip
                yield RunScript(SET_ASIDE, values)
        except SERVER_ERRORS as error:
            raise_if_refused(self.stream, error)
            raise
        self._handled = {}

    def leave(self) -> Steps[None]:
        """Acknowledge the responses that are handled, and requeue the others for other readers."""
        try:
            with suppress(StreamFaultError):
                yield from self.acknowledge()
            yield RunScript(REQUEUE, {"responses": self._key, "reader": self._name})
        except SERVER_ERRORS:
            pass  # other readers claim the responses
        self._fetched.clear()
        self._given = {}
        self._repeats.put_back()

    def _next_fetched(self) -> StreamingResponse | StreamingError | None:
        """Return the next fetched response with a new chunk or an error, if there is one."""
        while self._fetched:
            entry_id, fields = self._fetched.popleft()
            if not fields:
                continue  # deleted before it was claimed
            if entry_id in self._given or entry_id in self._handled:
                continue  # delivered again, because it was not acknowledged for long
            unreadable: str | None = None
            found: StreamingResponse | StreamingError | None
            try:
                found = parse_output(entry_id, fields)
            except (CorruptResultError, UnsupportedVersionError) as error:
                unreadable = str(error)
                found = self._error_for(entry_id, fields, error)
            if isinstance(found, StreamingResponse):
                found = self._repeats.without(found)
            if found is None:
                self._handled[entry_id] = None
                continue
            self._given[entry_id] = _Given(fields, unreadable)
            return found
        return None

    def _error_for(self, entry_id: bytes, fields: Any, error: SutraError) -> StreamingError:
        """Return what the caller is given in place of a response that cannot be read."""
        message = (
            f"{str(error).rstrip('.')}. The response becomes a dead letter: `sutra stream dead-letters "
            f"{self.stream}` shows it, and with --retry it is to be read again."
        )
        return StreamingError(entry_id.decode(), readable_ids(fields), type(error).__name__, message)

    def _fetch(self) -> Steps[bool]:
        """Acknowledge, then claim or wait for responses; return False if the timeout is over."""
        yield from self.acknowledge()
        left_s = self._left_s()
        if left_s <= 0:
            return False
        try:
            yield from self._claim()
            if not self._fetched:
                yield from self._read(left_s)
        except redis.ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
            yield from self._create_group(left_s)
        return True

    def _claim(self) -> Steps[None]:
        """Take over responses from readers that fell silent; at most every second."""
        now = self._clock()
        if now - self._claimed_at < min(CLAIM_EVERY_S, self._claim_s / 2):
            return
        self._claimed_at = now
        arguments = {
            "name": self._key, "groupname": keys.READERS_GROUP, "consumername": self._name,
            "min_idle_time": int(1000 * self._claim_s), "count": FETCH,
        }  # fmt: skip
        claimed = yield from self._ask(Command("xautoclaim", arguments))
        self._take_in(claimed[1])
        if len(claimed[1]) == FETCH:
            self._claimed_at = -float("inf")  # there may be more

    def _read(self, most_s: float) -> Steps[None]:
        """Wait for new responses; if an answer was lost, take what the server thinks this reader has."""
        start = "0" if self._is_answer_lost else ">"
        arguments = {
            "streams": {self._key: start}, "groupname": keys.READERS_GROUP, "consumername": self._name,
            "count": FETCH, "block": max(1, int(1000 * min(BLOCK_S, most_s))),
        }  # fmt: skip
        answer = yield from self._ask(Command("xreadgroup", arguments))
        self._take_in(_entries(answer))

    def _ask(self, command: Command) -> Steps[Any]:
        """Ask for responses, which the server counts as this reader's even if no answer comes."""
        was_lost, self._is_answer_lost = self._is_answer_lost, True
        try:
            answer = yield command
        except redis.ResponseError:  # an answer, too
            self._is_answer_lost = was_lost
            raise
        self._is_answer_lost = was_lost and command.method != "xreadgroup"
        return answer

    def _take_in(self, entries: list[Any]) -> None:
        self._fetched.extend(entries)
        if entries:
            self._heard_at = self._clock()

    def _create_group(self, most_s: float) -> Steps[None]:
        """Create the readers' group, or wait a little if there is no such stream."""
        values = {"streams": keys.streams(), "responses": self._key, "name": self.stream}
        if not (yield RunScript(BEGIN, values)):
            yield Sleep(min(ABSENT_S, most_s))

    def _left_s(self) -> float:
        """Return the seconds until the stream has been silent too long; 0 or less: it has."""
        if self._timeout_s is None:
            return BLOCK_S
        return self._heard_at + self._timeout_s - self._clock()


def _entries(answer: Any) -> list[Any]:
    """Return the entries of the one stream that was read: RESP2 gives a list, RESP3 a dict."""
    if isinstance(answer, dict):
        (streams,) = answer.values() or [[]]
        return list(streams[0]) if streams else []
    return list(answer[0][1]) if answer else []
