"""The streams' part of a device worker: one thread takes and forms batches, one commits their results.

Streams share the worker's batcher with its tasks. A device pulls: the streams balance themselves over
the fleet.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from sutra_tasks.streaming.consumer.batch_size import SizeOptimizer
from sutra_tasks.streaming.consumer.commit import Committer
from sutra_tasks.streaming.consumer.intake import StreamIntake
from sutra_tasks.streaming.consumer.recorder import Recorder
from sutra_tasks.streaming.consumer.shared_state import SharedState
from sutra_tasks.streaming.consumer.submission import Submitter
from sutra_tasks.streaming.consumer.upkeep import Upkeep

if TYPE_CHECKING:
    from sutra_tasks.batching.batcher import Batcher
    from sutra_tasks.batching.jobs import Batch
    from sutra_tasks.batching.shared_lock import SharedLock
    from sutra_tasks.engines.encoder import Encoder
    from sutra_tasks.settings import Settings
    from sutra_tasks.streaming.store import StreamStore
    from sutra_tasks.streaming.upkeep_store import UpkeepStore

__all__ = ["StreamConsumer"]


class StreamConsumer:
    """Builds and starts both threads, and owns what they share."""

    def __init__(
        self,
        store: StreamStore,
        upkeep_store: UpkeepStore,
        model: Callable[[], Encoder],
        batcher: Batcher,
        *,
        options: Settings,
        device_id: str,
        lock: SharedLock,
        serves: Callable[[], bool],
        load: Callable[[], float],
    ) -> None:
        """Prepare the threads.

        Args:
            store: with the streams' entries and texts.
            upkeep_store: with the streams' states.
            model: returns the engine that serves now; another one after a roll-out.
            batcher: computes.
            options: of this deployment.
            device_id: of this device.
            lock: shares the device with tasks; a suspect has it exclusively.
            serves: says whether the device takes work.
            load: returns the load of this machine, 0 to 1.
        """
        self._shared = SharedState(SizeOptimizer(options.stream_batch_size, options.batch_texts))
        recorder = Recorder(batcher)
        submitter = Submitter(batcher, store, self._shared, lock)
        faults = self._shared.faults
        upkeep = Upkeep(store, upkeep_store, recorder, options, load, faults=faults)
        intake = StreamIntake(
            store,
            submitter,
            self._shared,
            recorder,
            options,
            model=model,
            serves=serves,
            under_pressure=upkeep.under_pressure,
        )
        committer = Committer(store, submitter, self._shared, recorder, upkeep, device_id=device_id)
        self._reader = threading.Thread(target=intake.run, name="stream-reader", daemon=True)
        self._writer = threading.Thread(target=committer.run, name="stream-writer", daemon=True)

    def start(self) -> None:
        """Begin to read."""
        self._reader.start()
        self._writer.start()

    def measured(self, batch: Batch) -> None:
        """Learn from a batch of the engine, whether of streams or of tasks; on the batcher's thread."""
        if not batch.errors and not batch.retried:
            self._shared.learn(batch.texts, batch.compute_s, time.monotonic())
        self._shared.wake()

    def drain(self, timeout_s: float) -> None:
        """Take no more, and requeue what is in no batch yet."""
        self._shared.stop()
        if self._reader.ident is not None:
            self._reader.join(timeout_s)

    def stop(self, timeout_s: float) -> None:
        """Commit what is computed, and end."""
        self._shared.await_nothing_in_flight(timeout_s)
        self._shared.ended.set()
        if self._writer.ident is not None:
            self._writer.join(timeout_s)
