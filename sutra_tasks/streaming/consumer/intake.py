"""The reader's thread of a stream consumer: it takes entries and open texts, and forms batches."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

import redis

from sutra_tasks.errors import PoisonMessageError
from sutra_tasks.server_errors import server_words
from sutra_tasks.streaming.consumer import pacing
from sutra_tasks.streaming.consumer.batch_size import should_trigger
from sutra_tasks.streaming.consumer.items import StreamItem, item_error_fields
from sutra_tasks.streaming.consumer.pacing import (
    delivery,
    entries_of_stream,
    entries_to_take,
    growing_pause_s,
    next_wait,
    until_full_s,
)
from sutra_tasks.streaming.consumer.requeue import requeue
from sutra_tasks.streaming.consumer.tokenizing import StreamTokenizer

if TYPE_CHECKING:
    from sutra_tasks.engines.encoder import Encoder
    from sutra_tasks.settings import Settings
    from sutra_tasks.streaming.consumer.recorder import Recorder
    from sutra_tasks.streaming.consumer.shared_state import SharedState
    from sutra_tasks.streaming.consumer.submission import Submitter
    from sutra_tasks.streaming.delivered import OpenText, RawEntry
    from sutra_tasks.streaming.store import StreamStore

__all__ = ["StreamIntake"]

logger = logging.getLogger(__name__)

NAMES_S: Final = 0.5
"""Seconds between two looks for new streams."""
MOST_CLAIM_PAUSE_S: Final = 1.0
CLAIMS_S: Final = 0.2
"""Seconds of claims after which the streams are read again: suspects come one by one, each alone."""

_Given = TypeVar("_Given")


@dataclass(frozen=True, slots=True)
class _Round:
    """What one round of reads over all streams found.

    Attributes:
        taken: entries and texts.
        free: entries that may still be taken.
        has_more: whether a stream has more than was taken.
        streams: how many streams were read, or would have been.
        last_ids: of each stream without an entry, the id behind which the next one will stand.
    """

    taken: int
    free: int
    has_more: bool
    streams: int
    last_ids: dict[str, bytes]


class StreamIntake:
    """Takes what the streams have; :meth:`run` is the thread."""

    def __init__(
        self,
        store: StreamStore,
        submitter: Submitter,
        shared: SharedState,
        recorder: Recorder,
        options: Settings,
        *,
        model: Callable[[], Encoder],
        serves: Callable[[], bool],
        under_pressure: Callable[[], bool],
    ) -> None:
        """Begin with the model that serves now.

        Args:
            store: with the streams.
            submitter: gets the batches.
            shared: with the writer's thread.
            recorder: counts claims and dead letters.
            options: of this deployment.
            model: returns the engine that serves now.
            serves: says whether the device takes work.
            under_pressure: says whether a stream asks for larger batches.
        """
        self._store, self._submitter, self._shared = store, submitter, shared
        self._faults = shared.faults
        self._recorder, self._options = recorder, options
        self._model, self._serves, self._under_pressure = model, serves, under_pressure
        self._tokenizer = StreamTokenizer(model(), options)
        self._forming: deque[StreamItem] = deque()
        self._named_at = self._claimed_at = -float("inf")
        self._backlog = False

    def run(self) -> None:
        """Take and submit until the consumer stops; then requeue what is in no batch yet."""
        failures = 0
        while not self._shared.stopping.is_set():
            try:
                self.step(time.monotonic())
                failures = 0
                continue
            except redis.RedisError as error:
                logger.warning("streams are not read for now: %s", server_words(error))
            except Exception:
                logger.exception("a stream's entries were left to be claimed")
            failures += 1
            self._shared.stopping.wait(
                growing_pause_s(failures, pacing.SERVER_RETRY_S, pacing.MOST_SERVER_RETRY_S)
            )
        self._requeue_forming()

    def step(self, now: float) -> None:
        """Read every sound stream once, submit full batches, and wait if nothing was found."""
        self._follow_model()
        if now - self._named_at >= NAMES_S:
            self._shared.streams, self._named_at = self._store.streams(), now
            self._faults.keep_only(self._shared.streams)
        if not self._takes_work() or not self._shared.streams:
            self._requeue_forming()
            self._shared.stopping.wait(pacing.IDLE_S)
            return
        if now - self._claimed_at >= min(MOST_CLAIM_PAUSE_S, self._options.stream_claim_s / 2):
            self._claimed_at = now
            self._claim(now)
        size = self._shared.batch_size(now, backlog=self._backlog)
        texts_committed = self._shared.texts_committed
        found = self._read_streams(size, now)
        self._backlog = found.has_more or self._under_pressure()
        self._submit_forming(size)
        if not found.taken:
            self._wait(found, text_was_committed=self._shared.texts_committed != texts_committed)

    def _follow_model(self) -> None:
        """Use the model that serves now; the one before computes what it tokenised."""
        if (encoder := self._model()) is not self._tokenizer.encoder:
            self._submit_forming(self._options.batch_texts, at_once=True)
            self._tokenizer = StreamTokenizer(encoder, self._options)

    def _takes_work(self) -> bool:
        return self._shared.may_take(time.monotonic()) and self._serves()

    def _read_streams(self, size: int, now: float) -> _Round:
        in_flight = self._shared.rows_in_flight
        free = entries_to_take(
            size,
            waiting=self._submitter.waiting_texts,
            in_flight=in_flight,
            forming=len(self._forming),
        )
        taken, has_more = 0, free <= 0 and self._backlog
        last_ids: dict[str, bytes] = {}
        # Another stream comes first each time: the first one may take all there is room for.
        first, *others = self._shared.streams
        self._shared.streams = [*others, first]
        # What cannot be committed is not read: each device would compute it over and over.
        streams = [
            stream
            for stream in self._shared.streams
            if self._faults.is_due(stream, "read", "commit", now=now)
        ]
        for stream in streams:
            most = entries_of_stream(free, size, len(streams))
            if most <= 0:
                break
            with self._faults.guard(stream, "read", now):
                some, last = self._take(stream, most, now)
                taken, free, has_more = taken + some, free - some, has_more or some >= most
                if last is not None:
                    last_ids[stream] = last
        return _Round(taken, free, has_more, len(streams), last_ids)

    def _take(self, stream: str, most: int, now: float) -> tuple[int, bytes | None]:
        """Take from one stream; return how many entries and texts, and the id to wait behind."""
        read = self._store.read(
            stream,
            most,
            first_need=self._tokenizer.first_need,
            most_unread=self._options.stream_output_size,
        )
        taken_at = time.monotonic()
        self._form([self._tokenizer.entry_item(stream, raw, taken_at) for raw in read.entries])
        taken = len(read.entries)
        if read.takeable_texts:
            taken += self._take_texts(stream, max(1, most - taken), now)
        return taken, read.last

    def _take_texts(self, stream: str, most: int, now: float) -> int:
        """Take open texts of one stream, and return how many."""
        found = self._store.take_texts(
            stream,
            most,
            lease_s=self._options.stream_claim_s,
            most_bytes=self._tokenizer.most_bytes,
        )
        for text in found.texts:
            self._admit_text(stream, text, time.monotonic())
        for key, reason in found.damaged.items():
            self._faults.note(stream, f"open text {key}", reason, now)
        return len(found.texts)

    def _claim(self, now: float) -> None:
        """Take over from consumers that fell silent."""
        for stream in self._shared.streams:
            while self._takes_work() and self._faults.is_due(stream, "claim", "commit", now=now):
                if time.monotonic() - now >= CLAIMS_S:
                    self._claimed_at = -float("inf")  # goes on after a read
                    return
                with self._faults.guard(stream, "claim", now):
                    if not self._claim_some(stream):
                        break

    def _claim_some(self, stream: str) -> int:
        """Claim entries of one stream, and return how many."""
        claimed = self._store.claim(stream, self._options.stream_claim_s)
        if claimed.entries:
            self._recorder.claimed(stream, len(claimed.entries))
        for raw in claimed.entries:
            self._admit_claimed(stream, raw, claimed.deliveries)
        return len(claimed.entries)

    def _admit_claimed(self, stream: str, raw: RawEntry, deliveries: int) -> None:
        item = self._tokenizer.entry_item(stream, raw, time.monotonic(), deliveries)
        match delivery(deliveries, self._options.max_attempts):
            case "batch":
                self._form([item])
            case "alone":
                self._submit_alone(item)
            case "dead letter":
                item.error = PoisonMessageError(deliveries, "the workers that took this entry died")
                logger.error("stream %s, entry %s: %s", stream, item.source, item.error)
                reason = ["reason", str(item.error), "deliveries", deliveries]
                self._store.dead_letter(stream, raw, reason, item_error_fields(item))
                self._recorder.dead_lettered(stream)

    def _admit_text(self, stream: str, text: OpenText, now: float) -> None:
        item, deliveries = self._tokenizer.text_item(stream, text, now), text.attempts - 1
        match delivery(deliveries, self._options.max_attempts):
            case "batch":
                self._form([item])
            case "alone":
                self._submit_alone(item)
            case "dead letter":
                error = PoisonMessageError(deliveries, "the workers that took this text died")
                logger.error("stream %s: a stretch of a text was given up: %s", stream, error)
                self._tokenizer.give_up(item, error)
                self._submit([item])

    def _form(self, items: Sequence[StreamItem]) -> None:
        """Have items wait until there are enough for a batch."""
        self._shared.add(items)
        self._forming.extend(items)

    def _submit_forming(self, size: int, *, at_once: bool = False) -> None:
        """Submit batches of ``size`` that are full or old enough; with ``at_once`` everything."""
        while self._forming:
            if not at_once and not should_trigger(
                len(self._forming),
                1000 * (time.monotonic() - self._forming[0].taken_at),
                batch_size=size,
                max_latency_ms=self._options.stream_max_latency_ms,
            ):
                return
            self._submit([self._forming.popleft() for _ in range(min(size, len(self._forming)))])

    def _submit(self, items: Sequence[StreamItem]) -> None:
        self._unless_it_fails(self._submitter.submit, items)

    def _submit_alone(self, suspect: StreamItem) -> None:
        self._submit_forming(self._options.batch_texts, at_once=True)
        self._unless_it_fails(self._submitter.submit_alone, suspect)

    def _unless_it_fails(self, submit: Callable[[_Given, StreamTokenizer], None], given: _Given) -> None:
        """Submit; what the tokenizer fails on is left to be claimed, and the step goes on after a pause.

        Raises:
            redis.RedisError: the server does not answer.
        """
        try:
            submit(given, self._tokenizer)
        except redis.RedisError:
            raise
        except Exception:
            logger.exception("a stream's entries were left to be claimed")
            self._shared.stopping.wait(pacing.SERVER_RETRY_S)

    def _requeue_forming(self) -> None:
        items = list(self._forming)
        self._forming.clear()
        requeue(self._store, items)
        self._shared.remove(items)

    def _wait(self, found: _Round, *, text_was_committed: bool) -> None:
        """Wait until there may be something to take, or until the forming batch must go."""
        wait = next_wait(
            free=found.free,
            in_flight=self._shared.rows_in_flight,
            has_texts=text_was_committed or self._shared.has_texts(),
            forming=len(self._forming),
            streams=found.streams,
            empty_streams=len(found.last_ids),
        )
        if wait.event == "entry":
            if not self._store.await_entries(found.last_ids, wait.most_s):
                self._shared.stopping.wait(pacing.POLL_S)
            return
        age_s = time.monotonic() - self._forming[0].taken_at if self._forming else None
        timeout_s = until_full_s(age_s, self._options.stream_max_latency_ms / 1000, wait.most_s)
        if wait.event == "progress":
            self._shared.await_progress(timeout_s)
        else:
            self._shared.stopping.wait(timeout_s)
