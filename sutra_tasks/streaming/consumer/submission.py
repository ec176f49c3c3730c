"""Submitting batches of streams to the batcher that the device's tasks use as well."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

from sutra_tasks.streaming.consumer.shared_state import StreamBatch

if TYPE_CHECKING:
    from sutra_tasks.batching.batcher import Batcher
    from sutra_tasks.batching.jobs import Encoded
    from sutra_tasks.batching.shared_lock import SharedLock
    from sutra_tasks.streaming.consumer.items import StreamItem
    from sutra_tasks.streaming.consumer.shared_state import SharedState
    from sutra_tasks.streaming.consumer.tokenizing import StreamTokenizer
    from sutra_tasks.streaming.store import StreamStore

__all__ = ["Submitter"]

logger = logging.getLogger(__name__)


class Submitter:
    """Submits items to the batcher, and passes each batch to the writer once it is computed."""

    def __init__(
        self, batcher: Batcher, store: StreamStore, shared: SharedState, lock: SharedLock
    ) -> None:
        self._batcher, self._store, self._shared, self._lock = batcher, store, shared, lock

    @property
    def waiting_texts(self) -> int:
        """Texts that wait in the batcher, those of tasks included."""
        return self._batcher.waiting_texts

    def submit(self, items: Sequence[StreamItem], tokenizer: StreamTokenizer) -> None:
        """Have items computed as one batch, together with whatever else the batcher has.

        Raises:
            Exception: the tokenizer failed on the only item, which is left to be claimed.
        """
        self._lock.acquire_shared()  # before the tokenizer runs, because it can end the process as well
        try:
            batch = self._begin(items, tokenizer)
        except BaseException:
            self._lock.release_shared()
            raise
        rows = [row for item in batch.items for row in item.rows]
        if not rows:
            self._computed(batch, None)
            return
        future = self._batcher.submit(rows, encoder=tokenizer.encoder)
        future.add_done_callback(lambda done: self._computed(batch, done))

    def submit_alone(self, item: StreamItem, tokenizer: StreamTokenizer) -> None:
        """Have a suspect computed while nothing else is: if the process ends, it is to blame.

        Returns when it is computed.

        Raises:
            Exception: the tokenizer or the server failed. The item is left to be claimed.
        """
        self._shared.await_nothing_in_flight(or_stop=True)
        batch: StreamBatch | None = None
        future: Future[Encoded] | None = None
        try:
            with self._lock.exclusive():
                self._store.mark_suspect(item.source)
                try:
                    batch = self._begin([item], tokenizer)
                    if item.rows:
                        future = self._batcher.submit(item.rows, encoder=tokenizer.encoder)
                        future.exception()
                finally:
                    self._store.unmark_suspect()
        finally:
            if batch is not None:
                self._shared.computed.put((batch, future))

    def _begin(self, items: Sequence[StreamItem], tokenizer: StreamTokenizer) -> StreamBatch:
        formed_at = time.monotonic()
        items = self._tokenized(items, tokenizer)
        size = sum(max(1, len(item.rows)) for item in items)
        batch = StreamBatch(items, formed_at, tokenizer, size)
        self._shared.begin(batch)
        return batch

    def _tokenized(
        self, items: Sequence[StreamItem], tokenizer: StreamTokenizer
    ) -> Sequence[StreamItem]:
        """Give items their rows; of several, leave to be claimed what the tokenizer fails on."""
        try:
            tokenizer.tokenize(items)
        except Exception:
            if len(items) == 1:
                self._shared.remove(items)
                raise
        else:
            return items
        return [item for item in items if self._can_be_tokenized(item, tokenizer)]

    def _can_be_tokenized(self, item: StreamItem, tokenizer: StreamTokenizer) -> bool:
        try:
            tokenizer.tokenize([item])
        except Exception:
            logger.exception("stream %s: %s was left to be claimed", item.stream, item.source)
            self._shared.remove([item])
            return False
        return True

    def _computed(self, batch: StreamBatch, future: Future[Encoded] | None) -> None:
        self._lock.release_shared()
        self._shared.computed.put((batch, future))
