"""The writer's thread of a stream consumer: it commits computed batches and does the upkeep."""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import redis

from sutra_tasks.batching.jobs import DeviceBroken, Drained, Encoded, TextError
from sutra_tasks.errors import EncodingError
from sutra_tasks.streaming.consumer import pacing
from sutra_tasks.streaming.consumer.items import (
    StreamItem,
    chunk_fields,
    entry_answer,
    item_error_fields,
    response_header,
)
from sutra_tasks.streaming.consumer.requeue import requeue
from sutra_tasks.vectors import finish

if TYPE_CHECKING:
    from sutra_tasks.engines.encoder import Encoder
    from sutra_tasks.streaming.consumer.recorder import Recorder
    from sutra_tasks.streaming.consumer.shared_state import SharedState, StreamBatch
    from sutra_tasks.streaming.consumer.submission import Submitter
    from sutra_tasks.streaming.consumer.upkeep import Upkeep
    from sutra_tasks.streaming.delivered import CommitResult
    from sutra_tasks.streaming.store import StreamStore
    from sutra_tasks.vectors import Floats

__all__ = ["Committer", "is_retried"]

logger = logging.getLogger(__name__)


def is_retried(error: Exception) -> bool:
    """Say whether a commit that failed with ``error`` is tried again, until the worker ends.

    True of every error of the server, also of a refusal that will not pass. Items whose commit is not
    tried again are left to be claimed.
    """
    return isinstance(error, redis.RedisError)


class Committer:
    """Commits batches; :meth:`run` is the thread."""

    def __init__(
        self,
        store: StreamStore,
        submitter: Submitter,
        shared: SharedState,
        recorder: Recorder,
        upkeep: Upkeep,
        *,
        device_id: str,
    ) -> None:
        """Commit for one device.

        Args:
            store: with the streams.
            submitter: computes a batch again without a text that the engine failed on.
            shared: with the reader's thread.
            recorder: counts commits.
            upkeep: done between two commits.
            device_id: of this device.
        """
        self._store, self._submitter, self._shared = store, submitter, shared
        self._recorder, self._upkeep, self._device_id = recorder, upkeep, device_id
        self._no_upkeep_until = -float("inf")

    def run(self) -> None:
        """Commit until the consumer has ended and everything that is computed is committed."""
        computed = self._shared.computed
        while not self._shared.ended.is_set() or not computed.empty():
            try:
                batch, future = computed.get(timeout=self._upkeep.pause_s)
            except queue.Empty:
                pass
            else:
                self._settle(batch, future)
            self._do_upkeep(time.monotonic())
        self._upkeep.leave()

    def _do_upkeep(self, now: float) -> None:
        if now < self._no_upkeep_until:
            return
        try:
            self._upkeep.step(self._shared.streams, self._shared.taken())
        except redis.RedisError as error:
            logger.warning("no upkeep of streams for now: %s", error)
            self._no_upkeep_until = now + pacing.SERVER_RETRY_S  # commits go on meanwhile
        except Exception:
            logger.exception("no upkeep of streams for now")
            self._no_upkeep_until = now + pacing.SERVER_RETRY_S

    def _settle(self, batch: StreamBatch, future: Future[Encoded] | None) -> None:
        """Commit a batch; if it was not computed, compute it again or requeue it."""
        is_submitted_again = False
        try:
            if future is None:
                rows, compute_s = np.empty((0, 0), dtype=np.float32), 0.0
            else:
                encoded = future.result()
                rows, compute_s = _unit_rows(encoded), encoded.compute_s
            self._commit(batch, rows, compute_s)
        except TextError as error:
            is_submitted_again = self._submit_without(batch, error)
        except Drained:
            requeue(self._store, batch.items)
        except DeviceBroken:
            self._shared.pause_after_failure(time.monotonic())
            requeue(self._store, batch.items, failed=True)
        except Exception:
            logger.exception("a stream's entries were left to be claimed")
        finally:
            if not is_submitted_again:
                self._shared.remove(batch.items)
            self._shared.finish(batch)

    def _submit_without(self, batch: StreamBatch, error: TextError) -> bool:
        """Compute a batch again without the text that the engine failed on, which gets an error.

        Returns False if that failed as well.
        """
        position, culprit = error.position, batch.items[0]
        for item in batch.items:
            culprit = item
            if position < len(item.rows):
                break
            position -= len(item.rows)
        # The engine's message may quote the text: only the kind of its error is passed on.
        culprit.error = EncodingError(self._device_id, 0, type(error.cause).__name__)
        culprit.rows = []
        try:
            self._submitter.submit(batch.items, batch.tokenizer)
        except Exception:
            logger.exception("a stream's entries were left to be claimed")
            return False
        return True

    def _commit(self, batch: StreamBatch, rows: Floats, compute_s: float) -> None:
        """Commit a batch: the entries of each stream in one response, texts and errors one by one."""
        encoder, computed_at = batch.tokenizer.encoder, time.monotonic()
        first = 0
        entries: dict[str, list[tuple[StreamItem, Floats]]] = {}

        def record(items: Sequence[StreamItem], some_rows: Floats, result: CommitResult | None) -> None:
            self._recorder.committed(items, some_rows, batch, compute_s, result)

        for item in batch.items:
            item_rows = rows[first : first + len(item.rows)]
            first += len(item.rows)
            if item.text is None and item.error is None:
                entries.setdefault(item.stream, []).append((item, item_rows))
            else:
                result = self._until_committed(partial(self._commit_one, encoder, item, item_rows))
                if item.text is not None:
                    self._shared.text_committed()
                record([item], item_rows, result)
        for stream, some in entries.items():
            oldest = min(item.taken_at for item, _ in some)
            header = response_header(encoder, self._device_id, computed_at - oldest)
            answers = [entry_answer(item, item_rows) for item, item_rows in some]
            result = self._until_committed(partial(self._store.commit, stream, header, answers))
            record([item for item, _ in some], some[0][1], result)

    def _commit_one(self, encoder: Encoder, item: StreamItem, rows: Floats) -> CommitResult:
        if item.text is None:
            assert item.entry is not None
            return self._store.commit(item.stream, item_error_fields(item), [(item.entry[0], "", b"")])
        response: list[Any] = []
        if item.error is not None:
            response = [*item_error_fields(item)]
        elif item.chunks:
            latency_s = time.monotonic() - item.taken_at
            header = response_header(encoder, self._device_id, latency_s)
            response = [*header, *chunk_fields(item, rows)]
        return self._store.commit_text(
            item.stream,
            item.text,
            done_bytes=item.done_bytes,
            progress=item.progress,
            need=item.need,
            text_after=item.text_after,
            response=response,
        )

    def _until_committed(self, commit: Callable[[], CommitResult]) -> CommitResult | None:
        """Commit, and try again as :func:`is_retried` says: a commit that was done writes nothing twice.

        Returns None if the worker ended meanwhile.
        """
        while True:
            try:
                return commit()
            except Exception as error:
                if not is_retried(error):
                    raise
                logger.warning("vectors of a stream are kept until they can be written: %s", error)
                if self._shared.ended.wait(pacing.SERVER_RETRY_S):
                    return None


def _unit_rows(encoded: Encoded) -> Floats:
    """Return the rows as they stand in a response: float32, little-endian, of unit length."""
    return finish(encoded.rows, dimensions=None, normalize=True).astype("<f4", copy=False)
