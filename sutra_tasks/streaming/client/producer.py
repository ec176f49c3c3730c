"""Producers: they add texts to a stream, in batches of one round trip, no faster than the fleet embeds.

A batch that is sent again because its answer was lost adds nothing.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from sutra_tasks.client.texts import iterator_of
from sutra_tasks.connections import async_broker_client, broker_client
from sutra_tasks.streaming.client.producer_core import BATCH, ProducerCore, UnsentEntries
from sutra_tasks.streaming.client.steps import perform, perform_async, run, run_async

if TYPE_CHECKING:
    from types import TracebackType

    from sutra_tasks.errors import BackpressureSignal
    from sutra_tasks.settings import Settings
    from sutra_tasks.streaming.entries import StreamEntry

__all__ = ["AsyncStreamProducer", "StreamProducer"]


class StreamProducer:
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
        """Check the arguments; the connection is made when the first text is sent.

        Args:
            stream: its name; it need not exist.
            wait: whether to wait while the stream takes nothing. If False, the signal is raised at once.
            batch: entries in one round trip of :meth:`send_many` and :meth:`offer`.
            timeout_s: seconds to wait at most; ``SUTRA_STREAM_TIMEOUT_S`` if None.
            options: settings; those of the environment if None.
            clock: seconds that never go back.
            sleep: waits.

        Raises:
            InvalidOptionError: the stream's name or ``batch`` is invalid.
            BrokerNotConfiguredError: the settings name no server.
        """
        self._core = ProducerCore(
            stream, wait=wait, batch=batch, timeout_s=timeout_s, options=options, clock=clock
        )
        self._client = broker_client(self._core.options)
        self._perform = partial(
            perform, client=self._client, options=self._core.options, role="client", sleep=sleep
        )

    @property
    def throttle_rate(self) -> float:
        """Share of its own rate that this producer offers at present."""
        return self._core.throttle_rate

    def send(self, text: str | StreamEntry, **fields: Any) -> str:
        """Add one text and return its id.

        Args:
            text: the text, or an entry.
            **fields: the other fields of :class:`StreamEntry`.

        Raises:
            InvalidInputError: it cannot be embedded.
            BackpressureSignal: the stream did not take it, for ``timeout_s`` if this producer waits.
            StreamFaultError: the server refuses the entry for good.
            UnconfirmedEntriesError: the server did not answer.
        """
        return run(self._core.send(text, fields), self._perform)

    def send_many(self, entries: Iterable[str | StreamEntry]) -> int:
        """Add any number of texts, in order, and return how many; the iterable is read batch by batch.

        A batch is sent when it is full or the iterable ends; use :meth:`send` for a text that must not
        wait for more.

        Raises:
            InvalidInputError: ``entries`` is one text or no iterable; or as for :meth:`send`, with the
                entry's position, and all entries before it are in the stream.
            BackpressureSignal: as for :meth:`send`; :meth:`offer` can go on after one.
            StreamFaultError, UnconfirmedEntriesError: as for :meth:`send`.
        """
        return run(self._core.send_many(iterator_of(entries, "send_many()")), self._perform)

    def offer(self, entries: Iterable[str | StreamEntry]) -> Iterator[BackpressureSignal]:
        """Add any number of texts, and yield a signal whenever the stream takes no more for now.

        The caller decides what to do about a signal; when it asks for the next one, the refused entries
        are offered again. All entries are in the stream when the iterator ends.

        Raises:
            InvalidInputError: as for :meth:`send_many`.
            StreamFaultError, UnconfirmedEntriesError: as for :meth:`send`.
        """
        unsent = UnsentEntries(iterator_of(entries, "offer()"))
        while signal := run(self._core.add_until_refused(unsent), self._perform):
            yield signal

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._core.stream}>"


class AsyncStreamProducer:
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
        """Check the arguments, which are :class:`StreamProducer`'s; it connects with the first text."""
        self._core = ProducerCore(
            stream, wait=wait, batch=batch, timeout_s=timeout_s, options=options, clock=time.monotonic
        )
        self._client = async_broker_client(self._core.options)
        self._perform = partial(
            perform_async, client=self._client, options=self._core.options, role="client"
        )

    @property
    def throttle_rate(self) -> float:
        """Share of its own rate that this producer offers at present."""
        return self._core.throttle_rate

    async def send(self, text: str | StreamEntry, **fields: Any) -> str:
        """Add one text and return its id; see :meth:`StreamProducer.send`."""
        return await run_async(self._core.send(text, fields), self._perform)

    async def send_many(
        self, entries: Iterable[str | StreamEntry] | AsyncIterable[str | StreamEntry]
    ) -> int:
        """Add any number of texts, in order; see :meth:`StreamProducer.send_many`."""
        return await run_async(self._core.send_many(_iterator(entries, "send_many()")), self._perform)

    async def offer(
        self, entries: Iterable[str | StreamEntry] | AsyncIterable[str | StreamEntry]
    ) -> AsyncIterator[BackpressureSignal]:
        """Add any number of texts, and yield signals; see :meth:`StreamProducer.offer`."""
        unsent = UnsentEntries(_iterator(entries, "offer()"))
        while signal := await run_async(self._core.add_until_refused(unsent), self._perform):
            yield signal

    async def close(self) -> None:
        """Close the connection."""
        await self._client.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._core.stream}>"


def _iterator(
    entries: Iterable[Any] | AsyncIterable[Any], method: str
) -> Iterator[Any] | AsyncIterator[Any]:
    return aiter(entries) if isinstance(entries, AsyncIterable) else iterator_of(entries, method)
