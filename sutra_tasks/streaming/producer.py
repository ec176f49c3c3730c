"""Adding texts to a stream: in batches of one round trip each, and no faster than the fleet wants them.

The server decides in the same step in which it adds whether there is room, so a stream never holds more
than its capacity, and says how full it is. A batch that is sent again because its answer was lost adds
nothing.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Self

import redis
import redis.asyncio

from sutra_tasks import keys
from sutra_tasks.connections import async_broker_client, broker_client
from sutra_tasks.errors import (
    BackpressureSignal,
    BrokerNotConfiguredError,
    InvalidOptionError,
    UnconfirmedEntriesError,
)
from sutra_tasks.settings import settings
from sutra_tasks.streaming import scripts
from sutra_tasks.streaming.backpressure import pause_s
from sutra_tasks.streaming.entries import LOW_PRIORITY, StreamEntry, check_stream

if TYPE_CHECKING:
    from types import TracebackType

    from sutra_tasks.settings import Settings

__all__ = ["AsyncStreamProducer", "StreamProducer"]

BATCH: Final = 64
BATCH_CHARS: Final = 1_000_000
AGAIN_S: Final = 0.25
"""Seconds until a server that does not answer is asked again."""
ROOM_SHARE: Final = 0.1
"""Of the capacity: what a producer waits for to become free."""
RETRY_S: Final = (0.02, 1.0)
NO_ANSWER: Final = (redis.ConnectionError, redis.TimeoutError, redis.OutOfMemoryError, OSError)
"""A server without memory for more is waited for, too: workers make room."""

_AWAY_S: Final = ContextVar("away_s", default=(0.0, 0.0))
"""Seconds this thread or task was in producers, of whatever stream, and those of them at rest: rests
must not bring about rests, and who feeds several streams rests for all of them at once."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """What the server said to a batch."""

    taken: int
    size: int
    capacity: int
    throttle_rate: float
    per_s: float

    def signal(self, accepted: int = 0) -> BackpressureSignal:
        """Return what a producer is told whose entry was not taken."""
        least, most = RETRY_S
        room_s = ROOM_SHARE * self.capacity / self.per_s if self.per_s else AGAIN_S
        return BackpressureSignal(
            self.size, self.capacity, self.throttle_rate, min(most, max(least, room_s)), accepted
        )


class _Sending:
    """What both producers have in common: no I/O in it."""

    def __init__(
        self,
        stream: str,
        *,
        wait: bool,
        batch: int,
        timeout_s: float | None,
        options: Settings | None,
        clock: Callable[[], float],
    ) -> None:
        self._stream, self._wait, self._batch, self._clock = check_stream(stream), wait, batch, clock
        if batch < 1:
            raise InvalidOptionError("batch", str(batch), "1 or more")
        self._options = options or settings()
        if self._options.broker_url is None:
            raise BrokerNotConfiguredError
        self._timeout_s = self._options.stream_timeout_s if timeout_s is None else timeout_s
        self._name = uuid.uuid4().hex
        self._batches = self._entries = 0
        self._throttle_rate = 1.0
        self._returned_at: tuple[float, tuple[float, float]] | None = (clock(), _AWAY_S.get())

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._stream}>"

    @property
    def throttle_rate(self) -> float:
        """Share of its own rate that this producer offers at present."""
        return self._throttle_rate

    def _entry(self, given: str | StreamEntry) -> StreamEntry:
        entry = given if isinstance(given, StreamEntry) else StreamEntry(given)
        entry.checked(self._options.max_text_chars)
        if entry.id is not None:
            return entry
        self._entries += 1
        return replace(entry, id=f"{self._name}-{self._entries}")

    def _pause_s(self) -> float:
        """Return how long to rest before a batch, for the work that its texts took."""
        if self._returned_at is None:  # refused: its caller has waited
            return 0.0
        at, before = self._returned_at
        # Another thread's count is another one: a producer may have been handed over.
        away_s, rested_s = (
            max(0.0, now - then) for now, then in zip(_AWAY_S.get(), before, strict=True)
        )
        own_s = min(self._clock() - at - away_s, keys.STATE_S)  # an idle hour was no work
        return max(0.0, pause_s(own_s, self._throttle_rate) - rested_s)

    def _request(self, entries: Sequence[StreamEntry]) -> tuple[list[str], list[Any]]:
        """Return keys and arguments of the script; each request is another batch."""
        self._batches += 1
        names = [keys.stream(self._stream, part) for part in ("in", "closed", "state")]
        names += [keys.stream(self._stream, f"by:{self._name}"), keys.STREAMS]
        names.append(keys.stream(self._stream, "totals"))
        arguments: list[Any] = [
            self._stream, self._batches, self._options.stream_buffer_size, LOW_PRIORITY,
            keys.FORGET_AFTER_S, keys.REMEMBER_S,
        ]  # fmt: skip
        for entry in entries:
            fields = entry.fields()
            arguments += [entry.priority, len(fields), *fields]
        return names, arguments

    def _heard(self, answer: Any) -> _Answer:
        taken, size, capacity, throttle_rate, per_s = answer
        found = _Answer(taken, size, capacity, float(throttle_rate), float(per_s))
        self._throttle_rate = found.throttle_rate
        return found

    def _away(self, began: float, *, rested: bool = False) -> None:
        """Count the time since ``began`` as none of the caller's work."""
        passed_s = self._clock() - began
        away_s, rested_s = _AWAY_S.get()
        _AWAY_S.set((away_s + passed_s, rested_s + passed_s if rested else rested_s))

    def _returned(self, began: float, *, refused: bool) -> None:
        """Begin to count the caller's work, unless it is to wait."""
        self._away(began)
        self._returned_at = None if refused else (self._clock(), _AWAY_S.get())

    def _full(self, part: Sequence[StreamEntry]) -> bool:
        return len(part) >= self._batch or sum(len(one.text) for one in part) >= BATCH_CHARS

    def _parts(self, entries: Iterable[str | StreamEntry]) -> Iterator[list[StreamEntry]]:
        """Divide entries into batches; those before one that cannot be embedded are still sent."""
        part: list[StreamEntry] = []
        try:
            for given in entries:
                part.append(self._entry(given))
                if self._full(part):
                    full, part = part, []
                    yield full
        except Exception:  # of the caller's iterable, too
            if part:
                yield part
            raise
        if part:
            yield part


class StreamProducer(_Sending):
    """Adds texts to a stream; for one thread.

    >>> with StreamProducer("docs") as producer:  # doctest: +SKIP
    ...     producer.send("one text", id="42")
    """

    def __init__(
        self,
        stream: str,
        *,
        wait: bool = True,
        batch: int = BATCH,
        timeout_s: float | None = None,
        options: Settings | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Connect when the first text is sent.

        Args:
            stream: its name; it need not exist.
            wait: whether to wait while the stream takes nothing. If not, that is raised at once.
            batch: entries in one round trip of :meth:`send_many` and :meth:`offer`.
            timeout_s: seconds to wait at most; ``SUTRA_STREAM_TIMEOUT_S`` if None.
            options: settings; those of the environment if None.
            clock: seconds that never go back.
            sleep: waits.
        """
        super().__init__(
            stream, wait=wait, batch=batch, timeout_s=timeout_s, options=options, clock=clock
        )
        self._sleep = sleep
        self._client = broker_client(self._options)
        self._add = self._client.register_script(scripts.ADD)

    def send(self, text: str | StreamEntry, **fields: Any) -> str:
        """Add one text and return its id.

        Args:
            text: the text, or an entry.
            fields: of :class:`StreamEntry`, beside the text.

        Raises:
            InvalidInputError: it cannot be embedded.
            BackpressureSignal: the stream did not take it, for ``timeout_s`` if this producer waits.
            UnconfirmedEntriesError: the server did not answer.
        """
        entry = self._entry(text if isinstance(text, StreamEntry) else StreamEntry(text, **fields))
        self._all([entry])
        return entry.id or ""

    def send_many(self, entries: Iterable[str | StreamEntry]) -> int:
        """Add any number of texts, in order, and return how many; the iterable is read as they go.

        A batch goes when it is full or the iterable ends: what must not wait is for :meth:`send`.

        Raises:
            InvalidInputError: as for :meth:`send`; all before it are in the stream.
            BackpressureSignal: as for :meth:`send`; :meth:`offer` goes on after one.
            UnconfirmedEntriesError: as for :meth:`send`.
        """
        sent = 0
        for part in self._parts(entries):
            self._all(part, sent)
            sent += len(part)
        return sent

    def offer(self, entries: Iterable[str | StreamEntry]) -> Iterator[BackpressureSignal]:
        """Add any number of texts, and yield a signal whenever the stream takes no more for now.

        The caller decides what to do about it; when it asks for the next one, what was not taken is
        offered again. All are in the stream when the iterator ends.
        """
        for part in self._parts(entries):
            left: Sequence[StreamEntry] = part
            while answer := self._send(left):
                left = left[answer.taken :]
                if not left:
                    break
                yield answer.signal()

    def close(self) -> None:
        """Let go of the connection."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _all(self, part: Sequence[StreamEntry], accepted: int = 0) -> None:
        deadline = self._clock() + self._timeout_s
        while part:
            answer = self._send(part)
            part, accepted = part[answer.taken :], accepted + answer.taken
            if part:
                left_s = deadline - self._clock()
                if not self._wait or left_s <= 0:
                    raise answer.signal(accepted)
                self._rest(min(answer.signal().retry_after_s, left_s))

    def _rest(self, seconds: float) -> None:
        began = self._clock()
        self._sleep(seconds)
        self._away(began, rested=True)

    def _send(self, part: Sequence[StreamEntry]) -> _Answer:
        rest_s = self._pause_s()
        if rest_s > 0:
            self._rest(rest_s)
        names, arguments = self._request(part)
        began = self._clock()
        deadline = began + self._timeout_s
        while True:
            try:
                answer = self._heard(self._add(keys=names, args=arguments))
            except NO_ANSWER as error:
                if self._clock() >= deadline:
                    raise UnconfirmedEntriesError([one.id or "" for one in part], str(error)) from None
                self._sleep(AGAIN_S)
            else:
                self._returned(began, refused=answer.taken < len(part))
                return answer


class AsyncStreamProducer(_Sending):
    """Adds texts to a stream, as :class:`StreamProducer` does; for one task of one event loop.

    >>> async with AsyncStreamProducer("docs") as producer:  # doctest: +SKIP
    ...     await producer.send("one text", id="42")
    """

    def __init__(
        self,
        stream: str,
        *,
        wait: bool = True,
        batch: int = BATCH,
        timeout_s: float | None = None,
        options: Settings | None = None,
    ) -> None:
        """Connect when the first text is sent; the arguments are :class:`StreamProducer`'s."""
        super().__init__(
            stream, wait=wait, batch=batch, timeout_s=timeout_s, options=options, clock=time.monotonic
        )
        self._client = async_broker_client(self._options)
        self._add = self._client.register_script(scripts.ADD)

    async def send(self, text: str | StreamEntry, **fields: Any) -> str:
        """Add one text and return its id; see :meth:`StreamProducer.send`."""
        entry = self._entry(text if isinstance(text, StreamEntry) else StreamEntry(text, **fields))
        await self._all([entry])
        return entry.id or ""

    async def send_many(
        self, entries: Iterable[str | StreamEntry] | AsyncIterable[str | StreamEntry]
    ) -> int:
        """Add any number of texts, in order; see :meth:`StreamProducer.send_many`."""
        sent = 0
        async for part in self._async_parts(entries):
            await self._all(part, sent)
            sent += len(part)
        return sent

    async def offer(
        self, entries: Iterable[str | StreamEntry] | AsyncIterable[str | StreamEntry]
    ) -> AsyncIterator[BackpressureSignal]:
        """Add any number of texts, and yield signals; see :meth:`StreamProducer.offer`."""
        async for part in self._async_parts(entries):
            left: Sequence[StreamEntry] = part
            while answer := await self._send(left):
                left = left[answer.taken :]
                if not left:
                    break
                yield answer.signal()

    async def close(self) -> None:
        """Let go of the connection."""
        await self._client.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _async_parts(
        self, entries: Iterable[str | StreamEntry] | AsyncIterable[str | StreamEntry]
    ) -> AsyncIterator[list[StreamEntry]]:
        if isinstance(entries, Iterable):
            for ready in self._parts(entries):
                yield ready
            return
        part: list[StreamEntry] = []
        try:
            async for given in entries:
                part.append(self._entry(given))
                if self._full(part):
                    full, part = part, []
                    yield full
        except Exception:  # of the caller's iterable, too
            if part:
                yield part
            raise
        if part:
            yield part

    async def _all(self, part: Sequence[StreamEntry], accepted: int = 0) -> None:
        deadline = self._clock() + self._timeout_s
        while part:
            answer = await self._send(part)
            part, accepted = part[answer.taken :], accepted + answer.taken
            if part:
                left_s = deadline - self._clock()
                if not self._wait or left_s <= 0:
                    raise answer.signal(accepted)
                await self._rest(min(answer.signal().retry_after_s, left_s))

    async def _rest(self, seconds: float) -> None:
        began = self._clock()
        await asyncio.sleep(seconds)
        self._away(began, rested=True)

    async def _send(self, part: Sequence[StreamEntry]) -> _Answer:
        rest_s = self._pause_s()
        if rest_s > 0:
            await self._rest(rest_s)
        names, arguments = self._request(part)
        began = self._clock()
        deadline = began + self._timeout_s
        while True:
            try:
                answer = self._heard(await self._add(keys=names, args=arguments))
            except NO_ANSWER as error:
                if self._clock() >= deadline:
                    raise UnconfirmedEntriesError([one.id or "" for one in part], str(error)) from None
                await asyncio.sleep(AGAIN_S)
            else:
                self._returned(began, refused=answer.taken < len(part))
                return answer
