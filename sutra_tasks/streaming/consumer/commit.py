"""The writer's thread of a stream consumer: it commits computed batches and does the upkeep."""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
import redis

from sutra_tasks.batching.jobs import DeviceBroken, Drained, Encoded, TextError
from sutra_tasks.errors import EncodingError, StreamFaultError
from sutra_tasks.server_errors import server_words
from sutra_tasks.streaming.consumer import pacing
from sutra_tasks.streaming.consumer.faults import concerns_one_stream
from sutra_tasks.streaming.consumer.items import (
    StreamItem,
    chunk_fields,
    entry_answer,
    item_error_fields,
    response_header,
    text_letter,
)
from sutra_tasks.streaming.consumer.requeue import requeue
from sutra_tasks.vectors import finish

if TYPE_CHECKING:
    from sutra_tasks.streaming.consumer.recorder import Recorder
    from sutra_tasks.streaming.consumer.shared_state import SharedState, StreamBatch
    from sutra_tasks.streaming.consumer.submission import Submitter
    from sutra_tasks.streaming.consumer.upkeep import Upkeep
    from sutra_tasks.streaming.delivered import CommitResult
    from sutra_tasks.streaming.store import StreamStore
    from sutra_tasks.vectors import Floats

__all__ = ["Committer"]

logger = logging.getLogger(__name__)

LARGE_BYTES: Final = 500_000
"""Bytes of vectors from which on a server may find a response too large; its limits are 1 MB or more. It
may close the connection over it without a word, as if it were away."""
LARGE_FAILURES: Final = 2


@dataclass(frozen=True, slots=True)
class _Computed:
    """A batch, when it was computed, seconds of the monotonic clock, and how long it took."""

    batch: StreamBatch
    at: float
    compute_s: float


_Answer: TypeAlias = "tuple[StreamItem, Floats]"
"""An item and its rows."""


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
        self._upkeep_failures = 0

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
            self._upkeep_failures = 0
            return
        except redis.RedisError as error:
            logger.warning("no upkeep of streams for now: %s", server_words(error))
        except Exception:
            logger.exception("no upkeep of streams for now")
        self._upkeep_failures += 1
        self._no_upkeep_until = now + _server_pause_s(self._upkeep_failures)  # commits go on meanwhile

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
        answers: dict[str, list[_Answer]] = {}
        first, computed_at = 0, time.monotonic()
        for item in batch.items:
            answers.setdefault(item.stream, []).append((item, rows[first : first + len(item.rows)]))
            first += len(item.rows)
        for stream, some in answers.items():
            self._commit_stream(stream, some, _Computed(batch, computed_at, compute_s))

    def _commit_stream(self, stream: str, answers: Sequence[_Answer], computed: _Computed) -> None:
        """Commit what was computed of one stream; what the server refuses does not concern others."""
        left = dict.fromkeys(item for item, _ in answers)
        single = [one for one in answers if one[0].text is not None or one[0].error is not None]
        joint = [one for one in answers if one[0].text is None and one[0].error is None]
        try:
            for one in [[answer] for answer in single] + ([joint] if joint else []):
                self._commit_together(one, computed)
                for item, _ in one:
                    del left[item]
            self._shared.faults.clear(stream, "commit")
        except Exception as error:
            if not isinstance(error, redis.RedisError):
                logger.exception("stream %s: entries were left to be claimed", stream)
                return
            self._shared.faults.note(stream, "commit", server_words(error), time.monotonic())
            requeue(self._store, list(left))

    def _commit_together(self, answers: Sequence[_Answer], computed: _Computed) -> None:
        """Commit answers of one stream in one step; what is refused comes alone, and then as an error.

        Raises:
            redis.RedisError: the server refuses the error of a single item as well.
        """
        size_bytes = sum(item_rows.nbytes for _, item_rows in answers)
        try:
            result = self._until_committed(partial(self._write, answers, computed), size_bytes)
        except redis.RedisError as refusal:
            if len(answers) > 1:
                for answer in answers:
                    self._commit_together([answer], computed)
                return
            ((item, _),) = answers
            if item.error is not None:
                raise
            self._until_committed(partial(self._give_up, item, refusal))
            self._recorder.dead_lettered(item.stream)
            return
        (item, item_rows), *_ = answers
        if item.text is not None:
            self._shared.text_committed()
        items = [one for one, _ in answers]
        self._recorder.committed(items, item_rows, computed.batch, computed.compute_s, result)

    def _write(self, answers: Sequence[_Answer], computed: _Computed) -> CommitResult:
        """Write a response for entries of one stream, or for one open text; or the error of one item."""
        (item, rows), *_ = answers
        if item.error is not None and item.entry is not None:
            return self._store.commit(item.stream, item_error_fields(item), [(item.entry[0], "", b"")])
        if item.error is not None:
            return self._write_text(item, item_error_fields(item))
        oldest = min(one.taken_at for one, _ in answers)
        encoder = computed.batch.tokenizer.encoder
        header = response_header(encoder, self._device_id, computed.at - oldest)
        if item.text is None:
            return self._store.commit(item.stream, header, [entry_answer(*one) for one in answers])
        return self._write_text(item, [*header, *chunk_fields(item, rows)] if item.chunks else [])

    def _give_up(self, item: StreamItem, refusal: redis.RedisError) -> CommitResult | None:
        """Make an item a dead letter, because the server refuses its answer, and write an error."""
        item.error = StreamFaultError(item.stream, server_words(refusal))
        reason = ["reason", str(item.error)]
        logger.error("stream %s, %s: %s", item.stream, item.source, item.error)
        if item.entry is None:
            item.letter = text_letter(item, item.error)
            return self._write_text(item, item_error_fields(item))
        self._store.dead_letter(item.stream, item.entry, reason, item_error_fields(item))
        return None

    def _write_text(self, item: StreamItem, response: Sequence[Any]) -> CommitResult:
        assert item.text is not None
        return self._store.commit_text(
            item.stream,
            item.text,
            done_bytes=item.done_bytes,
            progress=item.progress,
            need=item.need,
            text_after=item.text_after,
            response=response,
            letter=item.letter,
        )

    def _until_committed(
        self, commit: Callable[[], CommitResult | None], size_bytes: int = 0
    ) -> CommitResult | None:
        """Commit, and try again until the server answers: a commit that was done writes nothing twice.

        Args:
            commit: writes to the server.
            size_bytes: of the vectors that it writes.

        Returns:
            None if the worker ended meanwhile.

        Raises:
            redis.RedisError: the server refuses the commit for good.
        """
        failures = 0
        while True:
            try:
                return commit()
            except redis.RedisError as error:
                if concerns_one_stream(error):
                    raise
                failures += 1
                if (
                    failures >= LARGE_FAILURES
                    and size_bytes >= LARGE_BYTES
                    and isinstance(error, redis.ConnectionError)
                    and self._store.answers()
                ):
                    raise redis.ResponseError(
                        f"it closes the connection over a response of {size_bytes:,} bytes; its "
                        "proto-max-bulk-len or client-query-buffer-limit is less"
                    ) from error
                logger.warning(
                    "vectors of a stream are kept until they can be written: %s", server_words(error)
                )
                if self._shared.ended.wait(_server_pause_s(failures)):
                    return None


def _server_pause_s(failures: int) -> float:
    return pacing.growing_pause_s(failures, pacing.SERVER_RETRY_S, pacing.MOST_SERVER_RETRY_S)


def _unit_rows(encoded: Encoded) -> Floats:
    """Return the rows as they stand in a response: float32, little-endian, of unit length."""
    return finish(encoded.rows, dimensions=None, normalize=True).astype("<f4", copy=False)
