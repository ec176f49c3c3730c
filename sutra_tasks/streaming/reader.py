"""Reading what devices wrote: each response until it is acknowledged, and no chunk twice.

Readers of one stream share its output; each response goes to one of them. One that dies leaves what it
had not acknowledged to the others. What they had worked on then comes once more, with the same ids and
vectors; within one reader repeats are dropped.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Any, Final, Self

import redis
import redis.asyncio

from sutra_tasks import keys
from sutra_tasks.connections import async_broker_client, broker_client
from sutra_tasks.errors import BrokerNotConfiguredError, InvalidOptionError
from sutra_tasks.settings import settings
from sutra_tasks.streaming.entries import check_stream
from sutra_tasks.streaming.responses import StreamingError, StreamingResponse, parse_output
from sutra_tasks.streaming.scripts import LEAVE, OUTPUT_GROUP

if TYPE_CHECKING:
    from types import TracebackType

    from sutra_tasks.settings import Settings

__all__ = ["AsyncStreamReader", "StreamReader"]

AT_ONCE: Final = 16
"""Responses fetched at a time: what is repeated at most if this process dies."""
BLOCK_S: Final = 1.0
AGAIN_S: Final = 0.25
REMEMBER: Final = 100_000
NO_ANSWER: Final = (redis.ConnectionError, redis.TimeoutError, redis.OutOfMemoryError, OSError)


class _Reading:
    """What both readers have in common: no I/O in it."""

    def __init__(
        self,
        stream: str,
        *,
        timeout_s: float | None,
        remember: int,
        claim_s: float,
        options: Settings | None,
    ) -> None:
        self._name = keys.stream(check_stream(stream), "out")
        self._stream = stream
        if remember < 0:
            raise InvalidOptionError("remember", str(remember), "0 or more")
        self._options = options or settings()
        if self._options.broker_url is None:
            raise BrokerNotConfiguredError
        self._timeout_s, self._claim_s = timeout_s, claim_s
        self._me = uuid.uuid4().hex
        self._waiting: deque[tuple[bytes, Any]] = deque()
        self._in_hand: list[bytes] = []
        self._done: list[bytes] = []
        self._seen: dict[str, None] = {}
        self._remember = remember
        self._claimed_at = -float("inf")
        self._heard_at = time.monotonic()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._stream}>"

    def _next(self) -> StreamingResponse | StreamingError | None:
        """Return the next response that is at hand, and holds something new."""
        while self._waiting:
            entry_id, fields = self._waiting.popleft()
            if not fields:
                continue  # claimed, and deleted meanwhile
            self._in_hand.append(entry_id)
            found = parse_output(entry_id, fields)
            if isinstance(found, StreamingError):
                return found
            if (news := self._news(found)) is not None:
                return news
        return None

    def _news(self, response: StreamingResponse) -> StreamingResponse | None:
        new = []
        for name in response.chunk_ids:
            new.append(name not in self._seen)
            self._seen[name] = None
        while len(self._seen) > self._remember:
            del self._seen[next(iter(self._seen))]
        if all(new):
            return response
        return response.only(new) if any(new) else None

    def _worked_on(self) -> None:
        self._done += self._in_hand
        self._in_hand = []

    def _acknowledge(self, pipe: Any) -> None:
        pipe.xack(self._name, OUTPUT_GROUP, *self._done)
        pipe.xdel(self._name, *self._done)

    def _leave(self, pipe: Any) -> None:
        """Acknowledge what is worked on, and let others have the rest at once."""
        if self._done:
            self._acknowledge(pipe)
        pipe.eval(LEAVE, 1, self._name, OUTPUT_GROUP, self._me)

    def _claim_due(self, now: float) -> bool:
        if now - self._claimed_at < min(1.0, self._claim_s / 2):
            return False
        self._claimed_at = now
        return True

    def _silent(self) -> dict[str, Any]:
        """Return arguments for taking over from readers that fell silent."""
        mine = {"name": self._name, "groupname": OUTPUT_GROUP, "consumername": self._me}
        return {**mine, "min_idle_time": int(1000 * self._claim_s), "count": AT_ONCE}

    def _more(self, most_s: float) -> dict[str, Any]:
        """Return arguments for taking what is new."""
        mine = {"groupname": OUTPUT_GROUP, "consumername": self._me, "streams": {self._name: ">"}}
        return {**mine, "count": AT_ONCE, "block": max(1, int(1000 * min(BLOCK_S, most_s)))}

    def _heard(self, entries: Any, now: float) -> None:
        self._waiting.extend(entries)
        if entries:
            self._heard_at = now

    def _left_s(self, now: float) -> float:
        """Return the seconds to wait still; 0 or less: it is over."""
        return BLOCK_S if self._timeout_s is None else self._heard_at + self._timeout_s - now


class StreamReader(_Reading):
    """Iterates over the responses and errors of a stream; for one thread.

    A response is acknowledged when the next one is asked for, or when the ``with`` block ends without an
    exception; until then it is somebody else's if this process dies.

    >>> with StreamReader("docs") as reader:  # doctest: +SKIP
    ...     for response in reader:
    ...         store(response.chunk_ids, response.embeddings)
    """

    def __init__(
        self,
        stream: str,
        *,
        timeout_s: float | None = None,
        remember: int = REMEMBER,
        claim_s: float = 30.0,
        options: Settings | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Connect when the first response is asked for.

        Args:
            stream: its name; it need not exist.
            timeout_s: seconds without news after which the iteration ends; None: never.
            remember: ids by which repeats are dropped.
            claim_s: seconds a reader may work on what it fetched at a time, 16 responses, before others
                take it over.
            options: settings; those of the environment if None.
            clock: seconds that never go back.
        """
        super().__init__(
            stream, timeout_s=timeout_s, remember=remember, claim_s=claim_s, options=options
        )
        self._clock = clock
        self._client = broker_client(self._options)

    def __iter__(self) -> Iterator[StreamingResponse | StreamingError]:
        """Yield what comes, in the order in which it was written.

        Raises:
            UnsupportedVersionError: another release wrote it.
            CorruptResultError: nothing of this package wrote it.
        """
        self._heard_at = self._clock()
        while True:
            found = self._next()
            if found is not None:
                yield found
                self._worked_on()
                self._heard_at = self._clock()  # it was not the stream that was silent
                continue
            self._worked_on()
            try:
                if not self._fetch():
                    return
            except NO_ANSWER:
                if self._left_s(self._clock()) <= AGAIN_S:
                    raise  # it would look as if the stream was silent
                time.sleep(AGAIN_S)

    def acknowledge(self) -> None:
        """Say that everything that was handed out is worked on."""
        self._worked_on()
        if self._done:
            with self._client.pipeline() as pipe:
                self._acknowledge(pipe)
                pipe.execute()
            self._done = []

    def close(self) -> None:
        """Leave what was not acknowledged to other readers, and let go of the connection."""
        try:
            with self._client.pipeline() as pipe:
                self._leave(pipe)
                pipe.execute(raise_on_error=False)
        except NO_ANSWER:
            pass  # others claim it
        finally:
            self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._worked_on()
        self.close()

    def _fetch(self) -> bool:
        """Acknowledge, and wait for more; say whether to go on."""
        self.acknowledge()
        now = self._clock()
        left_s = self._left_s(now)
        if left_s <= 0:
            return False
        try:
            if self._claim_due(now):
                claimed: Any = self._client.xautoclaim(**self._silent())
                self._heard(claimed[1], now)
            if not self._waiting:
                found = self._client.xreadgroup(**self._more(left_s))
                self._heard(_entries(found), self._clock())
        except redis.ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
            try:
                self._client.xgroup_create(self._name, OUTPUT_GROUP, id="0", mkstream=True)
            except redis.ResponseError as other:
                if "BUSYGROUP" not in str(other):  # else another reader was first
                    raise
        return True


class AsyncStreamReader(_Reading):
    """Iterates over a stream as :class:`StreamReader` does; for one task of one event loop.

    >>> async with AsyncStreamReader("docs") as reader:  # doctest: +SKIP
    ...     async for response in reader:
    ...         await store(response.chunk_ids, response.embeddings)
    """

    def __init__(
        self,
        stream: str,
        *,
        timeout_s: float | None = None,
        remember: int = REMEMBER,
        claim_s: float = 30.0,
        options: Settings | None = None,
    ) -> None:
        """Connect when the first response is asked for; the arguments are :class:`StreamReader`'s."""
        super().__init__(
            stream, timeout_s=timeout_s, remember=remember, claim_s=claim_s, options=options
        )
        self._client = async_broker_client(self._options)

    async def __aiter__(self) -> AsyncIterator[StreamingResponse | StreamingError]:
        """Yield what comes; see :meth:`StreamReader.__iter__`."""
        self._heard_at = time.monotonic()
        while True:
            found = self._next()
            if found is not None:
                yield found
                self._worked_on()
                self._heard_at = time.monotonic()  # it was not the stream that was silent
                continue
            self._worked_on()
            try:
                if not await self._fetch():
                    return
            except NO_ANSWER:
                if self._left_s(time.monotonic()) <= AGAIN_S:
                    raise  # it would look as if the stream was silent
                await asyncio.sleep(AGAIN_S)

    async def acknowledge(self) -> None:
        """Say that everything that was handed out is worked on."""
        self._worked_on()
        if self._done:
            async with self._client.pipeline() as pipe:
                self._acknowledge(pipe)
                await pipe.execute()
            self._done = []

    async def close(self) -> None:
        """Leave what was not acknowledged to other readers, and let go of the connection."""
        try:
            async with self._client.pipeline() as pipe:
                self._leave(pipe)
                await pipe.execute(raise_on_error=False)
        except NO_ANSWER:
            pass  # others claim it
        finally:
            await self._client.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._worked_on()
        await self.close()

    async def _fetch(self) -> bool:
        """Acknowledge, and wait for more; say whether to go on."""
        await self.acknowledge()
        now = time.monotonic()
        left_s = self._left_s(now)
        if left_s <= 0:
            return False
        try:
            if self._claim_due(now):
                claimed: Any = await self._client.xautoclaim(**self._silent())
                self._heard(claimed[1], now)
            if not self._waiting:
                found = await self._client.xreadgroup(**self._more(left_s))
                self._heard(_entries(found), time.monotonic())
        except redis.ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
            try:
                await self._client.xgroup_create(self._name, OUTPUT_GROUP, id="0", mkstream=True)
            except redis.ResponseError as other:
                if "BUSYGROUP" not in str(other):  # else another reader was first
                    raise
        return True


def _entries(found: Any) -> list[Any]:
    """Return the entries of the one stream that was read: protocol 2 gives a list, 3 a dict."""
    if isinstance(found, dict):
        (streams,) = found.values() or [[]]
        return list(streams[0]) if streams else []
    return list(found[0][1]) if found else []
