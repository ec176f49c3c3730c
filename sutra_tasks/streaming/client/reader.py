"""Readers: they iterate over what devices wrote to a stream's output.

Every response comes until it was handled: until the caller asked for the next one, or acknowledged it.
Readers of one stream share its output, and each response goes to one of them. What a reader did not
acknowledge when it died comes to another one again, with the same ids and vectors; within one reader
repeated chunks are dropped.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Self

from sutra_tasks.connections import async_broker_client, broker_client
from sutra_tasks.streaming.client.reader_core import REMEMBER, ReaderCore
from sutra_tasks.streaming.client.steps import perform, perform_async, run, run_async

if TYPE_CHECKING:
    from types import TracebackType

    from sutra_tasks.settings import Settings
    from sutra_tasks.streaming.responses import StreamingError, StreamingResponse

__all__ = ["AsyncStreamReader", "StreamReader"]


class StreamReader:
    """Iterates over the responses and errors of a stream; for one thread.

    A response is handled when the next one is asked for, or by :meth:`acknowledge`. One that was not,
    because the loop was left by an exception or a ``break``, comes again: to the next iteration over
    this reader or, once it is closed or its process died, to another reader.

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
        auto_acknowledge: bool = True,
        options: Settings | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Check the arguments; the connection is made when the first response is asked for.

        Args:
            stream: its name; it need not exist.
            timeout_s: seconds without a response after which the iteration ends; None: never.
            remember: handled chunks that are remembered, to drop repeats of them; 0: none are dropped.
            claim_s: seconds that a reader may work on the 16 responses that it fetches at a time, or
                that it has not acknowledged, before another reader takes them over.
            auto_acknowledge: whether asking for the next response says that the one before is handled.
                If False, only :meth:`acknowledge` does: for callers that handle many at once.
            options: settings; those of the environment if None.
            clock: seconds that never go back.

        Raises:
            InvalidOptionError: the stream's name or ``remember`` is invalid.
            BrokerNotConfiguredError: the settings name no server.
        """
        self._core = ReaderCore(
            stream,
            timeout_s=timeout_s,
            remember=remember,
            claim_s=claim_s,
            auto_acknowledge=auto_acknowledge,
            options=options,
            clock=clock,
        )
        self._client = broker_client(self._core.options)
        self._perform = partial(perform, client=self._client, options=self._core.options, role="reader")

    def __iter__(self) -> Iterator[StreamingResponse | StreamingError]:
        """Yield responses and errors as they were written; first comes what was given and not handled.

        In place of a response that cannot be read, because another release or another program wrote it,
        comes a :class:`StreamingError`; when it is handled, the response becomes a dead letter.

        Raises:
            StreamFaultError: the server refuses to read the stream.
            redis.RedisError: the server does not answer, for ``timeout_s``.
        """
        self._core.begin()
        while (found := run(self._core.next_response(), self._perform)) is not None:
            yield found

    def acknowledge(self) -> None:
        """Acknowledge every response that was handed out: it is handled.

        Raises:
            StreamFaultError: the server refuses it.
            redis.RedisError: the server does not answer; the next fetch acknowledges them.
        """
        self._core.mark_handled()
        run(self._core.acknowledge(), self._perform)

    def close(self) -> None:
        """Leave the responses that were not handled to other readers, and close the connection."""
        try:
            run(self._core.leave(), self._perform)
        finally:
            self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._core.stream}>"


class AsyncStreamReader:
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
        auto_acknowledge: bool = True,
        options: Settings | None = None,
    ) -> None:
        """Check the arguments, which are :class:`StreamReader`'s; it connects with the iteration."""
        self._core = ReaderCore(
            stream,
            timeout_s=timeout_s,
            remember=remember,
            claim_s=claim_s,
            auto_acknowledge=auto_acknowledge,
            options=options,
            clock=time.monotonic,
        )
        self._client = async_broker_client(self._core.options)
        self._perform = partial(
            perform_async, client=self._client, options=self._core.options, role="reader"
        )

    async def __aiter__(self) -> AsyncIterator[StreamingResponse | StreamingError]:
        """Yield responses and errors; see :meth:`StreamReader.__iter__`."""
        self._core.begin()
        while (found := await run_async(self._core.next_response(), self._perform)) is not None:
            yield found

    async def acknowledge(self) -> None:
        """Acknowledge every response that was handed out; see :meth:`StreamReader.acknowledge`."""
        self._core.mark_handled()
        await run_async(self._core.acknowledge(), self._perform)

    async def close(self) -> None:
        """Leave the responses that were not handled to other readers, and close the connection."""
        try:
            await run_async(self._core.leave(), self._perform)
        finally:
            await self._client.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._core.stream}>"
