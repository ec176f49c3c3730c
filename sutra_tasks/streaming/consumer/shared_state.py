"""What the threads of a stream consumer share, under one lock."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sutra_tasks.streaming.consumer.faults import StreamFaults

if TYPE_CHECKING:
    from sutra_tasks.batching.jobs import Encoded
    from sutra_tasks.streaming.consumer.batch_size import SizeOptimizer
    from sutra_tasks.streaming.consumer.items import StreamItem
    from sutra_tasks.streaming.consumer.tokenizing import StreamTokenizer

__all__ = ["ComputedBatch", "SharedState", "StreamBatch"]

BROKEN_S: Final = 2.0
"""Seconds without a take after this device failed its own check: by then it is known whether it serves.
A device that took meanwhile would soon have failed on every entry."""


@dataclass(frozen=True, slots=True, eq=False)
class StreamBatch:
    """Items whose rows are computed together, by the model that tokenised them.

    Attributes:
        items: the items.
        formed_at: when they were submitted, seconds of the monotonic clock.
        tokenizer: of the model.
        size: rows it counts for; an item without rows counts for one.
    """

    items: Sequence[StreamItem]
    formed_at: float
    tokenizer: StreamTokenizer
    size: int


ComputedBatch = tuple[StreamBatch, "Future[Encoded] | None"]
"""A batch, and its rows or why there are none; None: it has no rows to compute."""


class SharedState:
    """Shared by the reader's, the writer's and the batcher's thread.

    Attributes:
        stopping: set when nothing more is taken.
        ended: set when the writer is to end.
        computed: batches for the writer.
        streams: the names of all streams, as the reader last saw them.
        faults: of single streams.
    """

    def __init__(self, sizes: SizeOptimizer) -> None:
        """Begin without items; ``sizes`` says how large a batch should be."""
        self.stopping, self.ended = threading.Event(), threading.Event()
        self.computed: queue.SimpleQueue[ComputedBatch] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._sizes = sizes
        self.streams: Sequence[str] = ()
        self.faults = StreamFaults()
        self._taken: dict[StreamItem, None] = {}  # a set that keeps the order
        self._rows_in_flight = self._texts_committed = 0
        self._broken_until = -float("inf")

    @property
    def rows_in_flight(self) -> int:
        """Rows that wait, are computed, or are being committed."""
        return self._rows_in_flight

    @property
    def texts_committed(self) -> int:
        """Commits of open texts so far."""
        return self._texts_committed

    def add(self, items: Iterable[StreamItem]) -> None:
        """Count items as taken: they are refreshed from now on."""
        with self._changed:
            self._taken.update(dict.fromkeys(items))

    def remove(self, items: Iterable[StreamItem]) -> None:
        """Count items as taken no more: they are committed, requeued, or left to be claimed."""
        with self._changed:
            for item in items:
                self._taken.pop(item, None)

    def taken(self) -> list[StreamItem]:
        """Return the items that are taken."""
        with self._changed:
            return list(self._taken)

    def has_texts(self) -> bool:
        """Whether an open text is among the items that are taken."""
        with self._changed:
            return any(item.text is not None for item in self._taken)

    def begin(self, batch: StreamBatch) -> None:
        """Count the rows of a batch as in flight, and its items as taken."""
        with self._changed:
            self._rows_in_flight += batch.size
            self._taken.update(dict.fromkeys(batch.items))

    def finish(self, batch: StreamBatch) -> None:
        """Count the rows of a batch as in flight no more."""
        with self._changed:
            self._rows_in_flight -= batch.size
            self._changed.notify_all()

    def text_committed(self) -> None:
        """Count the commit of an open text."""
        with self._changed:
            self._texts_committed += 1

    def learn(self, texts: int, compute_s: float, now: float) -> None:
        """Learn how long a batch of so many texts took, whether of streams or of tasks."""
        with self._changed:
            self._sizes = self._sizes.measured(texts, compute_s, now)

    def batch_size(self, now: float, *, backlog: bool) -> int:
        """Return how many entries a full batch has now."""
        return self._sizes.size(now, backlog=backlog)

    def pause_after_failure(self, now: float) -> None:
        """Have nothing taken until it is known whether the device serves."""
        with self._changed:
            self._broken_until = now + BROKEN_S

    def may_take(self, now: float) -> bool:
        """Whether the consumer neither stops nor pauses."""
        return not self.stopping.is_set() and now >= self._broken_until

    def stop(self) -> None:
        """Have nothing more taken."""
        self.stopping.set()
        self.wake()

    def wake(self) -> None:
        """End the waits of other threads for progress."""
        with self._changed:
            self._changed.notify_all()

    def await_progress(self, timeout_s: float) -> None:
        """Return when a batch is computed or finished, or after a while."""
        with self._changed:
            self._changed.wait(timeout_s)

    def await_nothing_in_flight(self, timeout_s: float | None = None, *, or_stop: bool = False) -> None:
        """Return when no row is in flight, after a while, or, if so asked, when the consumer stops."""
        with self._changed:
            self._changed.wait_for(
                lambda: not self._rows_in_flight or (or_stop and self.stopping.is_set()), timeout_s
            )
