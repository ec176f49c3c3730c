"""Submitting batches of streams to the batcher that the device's tasks use as well."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from sutra_tasks.streaming.shared_state import StreamBatch

if TYPE_CHECKING:
    from sutra_tasks.batching.batcher import Batcher, Encoded
    from sutra_tasks.streaming.items import StreamItem
    from sutra_tasks.streaming.shared_state import SharedState
    from sutra_tasks.streaming.store import StreamStore
    from sutra_tasks.streaming.tokenizing import StreamTokenizer

__all__ = ["Seat", "Submitter"]


class Seat(Protocol):
    """How a worker's streams share the device with its tasks."""

    def join(self) -> None:
        """Begin to use it, with others."""

    def leave(self) -> None:
        """End that."""

    def alone(self) -> AbstractContextManager[None]:
        """Return a context in which nobody else uses it."""


class Submitter:
    """Submits items to the batcher, and passes each batch to the writer once it is computed."""

    def __init__(self, batcher: Batcher, store: StreamStore, shared: SharedState, seat: Seat) -> None:
        self._batcher, self._store, self._shared, self._seat = batcher, store, shared, seat

    @property
    def waiting_texts(self) -> int:
        """Texts that wait in the batcher, those of tasks included."""
        return self._batcher.waiting_texts

    def submit(self, items: Sequence[StreamItem], tokenizer: StreamTokenizer) -> None:
        """Have items computed as one batch, together with whatever else the batcher has.

        Raises:
            Exception: the tokenizer failed. The items are left to be claimed, one by one.
        """
        batch = self._begin(items, tokenizer)
        rows = [row for item in items for row in item.rows]
        if not rows:
            self._shared.computed.put((batch, None))
            return
        self._seat.join()
        future = self._batcher.submit(rows, encoder=tokenizer.encoder)
        future.add_done_callback(lambda done: self._computed(batch, done))

    def submit_alone(self, item: StreamItem, tokenizer: StreamTokenizer) -> None:
        """Have a suspect computed while nothing else is: if the process ends, it is to blame.

        Returns when it is computed.

        Raises:
            Exception: the tokenizer or the server failed. The item is left to be claimed.
        """
        self._shared.await_nothing_in_flight(or_stop=True)
        batch = self._begin([item], tokenizer)
        if not item.rows:
            self._shared.computed.put((batch, None))
            return
        future: Future[Encoded] | None = None
        try:
            with self._seat.alone():
                self._store.mark_suspect(item.source)
                future = self._batcher.submit(item.rows, encoder=tokenizer.encoder, alone=True)
                future.exception()
                self._store.unmark_suspect()
        finally:
            if future is not None:
                self._shared.computed.put((batch, future))
            else:  # the server is away
                self._shared.remove(batch.items)
                self._shared.finish(batch)

    def _begin(self, items: Sequence[StreamItem], tokenizer: StreamTokenizer) -> StreamBatch:
        formed_at = time.monotonic()
        try:
            tokenizer.tokenize(items)
        except BaseException:
            self._shared.remove(items)
            raise
        size = sum(max(1, len(item.rows)) for item in items)
        batch = StreamBatch(items, formed_at, tokenizer, size)
        self._shared.begin(batch)
        return batch

    def _computed(self, batch: StreamBatch, future: Future[Encoded]) -> None:
        self._seat.leave()
        self._shared.computed.put((batch, future))
