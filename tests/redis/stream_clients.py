"""Producers and readers of an event loop, used from a thread: one suite holds both kinds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from sutra_tasks.streaming.client.producer import AsyncStreamProducer, StreamProducer
from sutra_tasks.streaming.client.reader import AsyncStreamReader, StreamReader

if TYPE_CHECKING:
    from sutra_tasks.errors import BackpressureSignal
    from sutra_tasks.streaming.entries import StreamEntry
    from sutra_tasks.streaming.responses import StreamingError, StreamingResponse

__all__ = ["PRODUCERS", "READERS", "Producer", "Reader", "vanish"]


class _OnLoop:
    """An asynchronous object; each of its calls runs to its end on a loop, which several can share."""

    def __init__(
        self, kind: Callable[..., Any], stream: str, runner: asyncio.Runner | None, **given: Any
    ) -> None:
        self._runner, self._shared = runner or asyncio.Runner(), runner is not None
        self._one = self._run(self._made(kind, stream, given))
        self._core = self._one._core

    async def _made(self, kind: Callable[..., Any], stream: str, given: dict[str, Any]) -> Any:
        return kind(stream, **given)

    def _run(self, some: Any) -> Any:
        return self._runner.run(some)

    def _iterate(self, some: AsyncIterator[Any]) -> Iterator[Any]:
        async def following() -> Any:
            return await anext(some, None)

        while (found := self._run(following())) is not None:
            yield found

    def close(self) -> None:
        try:
            self._run(self._one.close())
        finally:
            self._leave()

    def __enter__(self) -> Self:
        self._run(self._one.__aenter__())
        return self

    def __exit__(self, *why: object) -> None:
        try:
            self._run(self._one.__aexit__(*why))
        finally:
            self._leave()

    def _leave(self) -> None:
        if not self._shared:
            self._runner.close()


class ProducerOnLoop(_OnLoop):
    def __init__(
        self,
        stream: str,
        *,
        runner: asyncio.Runner | None = None,
        arriving: bool = False,
        **given: Any,
    ) -> None:
        super().__init__(AsyncStreamProducer, stream, runner, **given)
        self._arriving = arriving

    @property
    def throttle_rate(self) -> float:
        return float(self._one.throttle_rate)

    @property
    def _perform(self) -> Any:
        return self._one._perform

    @_perform.setter
    def _perform(self, perform: Any) -> None:
        self._one._perform = perform

    def send(self, text: str | StreamEntry, **fields: Any) -> str:
        return str(self._run(self._one.send(text, **fields)))

    def send_many(self, entries: Iterable[str | StreamEntry]) -> int:
        return int(self._run(self._one.send_many(self._source(entries))))

    def offer(self, entries: Iterable[str | StreamEntry]) -> Iterator[BackpressureSignal]:
        return self._iterate(self._one.offer(self._source(entries)))

    def _source(self, entries: Iterable[Any]) -> Any:
        return _arriving(entries) if self._arriving else entries


async def _arriving(entries: Iterable[Any]) -> AsyncIterator[Any]:
    for one in entries:
        yield one


class ReaderOnLoop(_OnLoop):
    def __init__(self, stream: str, **given: Any) -> None:
        super().__init__(AsyncStreamReader, stream, None, **given)

    def __iter__(self) -> Iterator[StreamingResponse | StreamingError]:
        return self._iterate(aiter(self._one))

    def acknowledge(self) -> None:
        self._run(self._one.acknowledge())


def vanish(reader: Reader) -> None:
    """Cut a reader's connection, as the death of its process does."""
    if isinstance(reader, StreamReader):
        reader._client.close()
    else:
        reader._run(reader._one._client.aclose())
        reader._leave()


Producer = StreamProducer | ProducerOnLoop
Reader = StreamReader | ReaderOnLoop
PRODUCERS: dict[str, Callable[..., Producer]] = {
    "sync": StreamProducer,
    "async": ProducerOnLoop,
    "async of an asynchronous iterable": partial(ProducerOnLoop, arriving=True),
}
READERS: dict[str, Callable[..., Reader]] = {"sync": StreamReader, "async": ReaderOnLoop}
