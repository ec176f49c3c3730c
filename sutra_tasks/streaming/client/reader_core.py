"""What a reader does next: fetches responses, drops repeated chunks, and acknowledges. No I/O.

Readers of one stream share its output through a consumer group. A reader that dies leaves the responses
that it did not acknowledge to the others, which claim them after a while.
"""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import redis

from sutra_tasks import keys, lua
from sutra_tasks.errors import BrokerNotConfiguredError, InvalidOptionError
from sutra_tasks.settings import settings
from sutra_tasks.streaming.client.steps import NO_ANSWER, REPEAT_S, Command, RunScript, Sleep
from sutra_tasks.streaming.entries import check_stream
from sutra_tasks.streaming.responses import StreamingError, StreamingResponse, parse_output

if TYPE_CHECKING:
    from sutra_tasks.settings import Settings
    from sutra_tasks.streaming.client.steps import Steps

__all__ = ["REMEMBER", "ReaderCore"]

FETCH: Final = 16
"""Responses fetched at a time: no more are repeated if this process dies."""
BLOCK_S: Final = 1.0
"""Seconds that the server may hold back its answer until there is a response."""
CLAIM_EVERY_S: Final = 1.0
REMEMBER: Final = 100_000

ACKNOWLEDGE: Final = lua.script("streaming/lua/acknowledge_responses", GROUP=keys.READERS_GROUP)
REQUEUE: Final = lua.script("streaming/lua/requeue_responses", GROUP=keys.READERS_GROUP)


class ReaderCore:
    """The state of one reader, and the steps of its methods.

    A response is first ``_fetched``, then ``_given`` to the caller, then ``_worked_on``, and then
    acknowledged and forgotten.
    """

    def __init__(
        self,
        stream: str,
        *,
        timeout_s: float | None,
        remember: int,
        claim_s: float,
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
        self._name = uuid.uuid4().hex
        self._fetched: deque[tuple[bytes, Any]] = deque()
        self._given: list[bytes] = []
        self._worked_on: list[bytes] = []
        self._seen: dict[str, None] = {}
        self._remember = remember
        self._claimed_at = -float("inf")
        self._heard_at = clock()

    def next_response(self) -> Steps[StreamingResponse | StreamingError | None]:
        """Return the next response with a new chunk or an error; None: the stream was silent too long.

        Raises:
            UnsupportedVersionError: another release wrote it.
            CorruptResultError: it was not written by this package.
            redis.RedisError: the server does not answer, and the timeout is over.
        """
        self.mark_worked_on()
        self._heard_at = self._clock()  # while the caller worked, the stream was not silent
        while True:
            if (found := self._next_fetched()) is not None:
                return found
            self.mark_worked_on()  # responses with repeated chunks only
            try:
                if not (yield from self._fetch()):
                    return None
            except NO_ANSWER:
                if self._left_s() <= REPEAT_S:
                    raise  # the caller would think that the stream was silent
                yield Sleep(REPEAT_S)

    def mark_worked_on(self) -> None:
        """Let the responses that the caller was given be acknowledged next time."""
        self._worked_on += self._given
        self._given = []

    def acknowledge(self) -> Steps[None]:
        """Acknowledge the responses that are worked on."""
        if self._worked_on:
            yield RunScript(ACKNOWLEDGE, {"responses": self._key, "ids": self._worked_on})
            self._worked_on = []

    def leave(self) -> Steps[None]:
        """Acknowledge the responses that are worked on, and requeue the others for other readers."""
        try:
            yield from self.acknowledge()
            yield RunScript(REQUEUE, {"responses": self._key, "reader": self._name})
        except (redis.RedisError, OSError):
            pass  # other readers claim the responses

    def _next_fetched(self) -> StreamingResponse | StreamingError | None:
        """Return the next fetched response with a new chunk or an error, if there is one."""
        while self._fetched:
            entry_id, fields = self._fetched.popleft()
            if not fields:
                continue  # deleted before it was claimed
            self._given.append(entry_id)
            found = parse_output(entry_id, fields)
            if isinstance(found, StreamingError):
                return found
            if (new := self._without_repeats(found)) is not None:
                return new
        return None

    def _without_repeats(self, response: StreamingResponse) -> StreamingResponse | None:
        """Return the response with the chunks that were not seen yet; None if there are none."""
        new = []
        for name in response.chunk_ids:
            new.append(name not in self._seen)
            self._seen[name] = None
        while len(self._seen) > self._remember:
            del self._seen[next(iter(self._seen))]
        if all(new):
            return response
        return response.only(new) if any(new) else None

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
            yield from self._create_group()
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
        claimed = yield Command("xautoclaim", arguments)
        self._take_in(claimed[1])

    def _read(self, most_s: float) -> Steps[None]:
        """Wait for new responses."""
        arguments = {
            "streams": {self._key: ">"}, "groupname": keys.READERS_GROUP, "consumername": self._name,
            "count": FETCH, "block": max(1, int(1000 * min(BLOCK_S, most_s))),
        }  # fmt: skip
        self._take_in(_entries((yield Command("xreadgroup", arguments))))

    def _take_in(self, entries: list[Any]) -> None:
        self._fetched.extend(entries)
        if entries:
            self._heard_at = self._clock()

    def _create_group(self) -> Steps[None]:
        arguments = {"name": self._key, "groupname": keys.READERS_GROUP, "id": "0", "mkstream": True}
        try:
            yield Command("xgroup_create", arguments)
        except redis.ResponseError as error:
            if "BUSYGROUP" not in str(error):  # else another reader was first
                raise

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
