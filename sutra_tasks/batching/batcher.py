"""The thread that owns the engine: it collects jobs, computes batches of their rows, ends the jobs."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from sutra_tasks.batching.budget import TokenBudget
from sutra_tasks.batching.halving import encode_by_halves
from sutra_tasks.batching.jobs import (
    NO_CONTEXT,
    Batch,
    DeviceBroken,
    Drained,
    Encoded,
    EngineCall,
    Job,
    TextError,
    Unwanted,
    fail,
)
from sutra_tasks.batching.next_batch import pause_s, take_batch
from sutra_tasks.batching.watchdog import watched
from sutra_tasks.engines.out_of_memory import is_out_of_memory

if TYPE_CHECKING:
    from sutra_tasks.batching.halving import Outcome
    from sutra_tasks.batching.jobs import BatchRow, Encodes, JobContext
    from sutra_tasks.batching.next_batch import Limits
    from sutra_tasks.engines.encoder import TokenizedText
    from sutra_tasks.vectors import Floats

__all__ = ["Batcher"]

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

OUT_OF_MEMORY: Final = "out of memory at %d padded tokens: batches hold %d for now"


class Batcher:
    """Runs one device's models on one thread, in batches drawn from everything submitted.

    A batch is one model's. A job is computed by the encoder it was submitted with, so a model that is
    replaced finishes what was tokenized for it.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        on_batch: Callable[[Batch], None] = lambda _: None,
        self_check: Callable[[], bool] | None = None,
        batch_timeout_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare the thread.

        Args:
            limits: bounds of a batch, as long as memory suffices.
            on_batch: told of every batch, on the thread.
            self_check: says whether the device works. Asked on the thread when a batch had errors other
                than running out of memory; if it says no, every job of the batch fails with
                :class:`DeviceBroken`. One that raises has failed; without one the text is at fault.
            batch_timeout_s: when one call of the engine, ``self_check`` or a called function takes
                longer, the *process* ends, with all stacks on its standard error. None: never.
            clock: seconds that never go back.
        """
        self._on_batch, self._clock = on_batch, clock
        self._self_check, self._batch_timeout_s = self_check, batch_timeout_s
        self._budget, self._limits = TokenBudget(limits), limits
        self._changed = threading.Condition()
        self._announced: set[object] = set()
        self._jobs: list[Job] = []
        self._calls: list[EngineCall[Any]] = []
        self._texts = self._tokens = 0
        self._draining = self._closed = False
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)

    def start(self) -> None:
        """Begin computing."""
        self._thread.start()

    @property
    def waiting_texts(self) -> int:
        """Texts submitted and not yet in a batch."""
        return self._texts

    def announce(self) -> object:
        """Say that a job is on its way, so that a batch with space may wait for it.

        Returns:
            The announcement, for the job's :class:`JobContext` and for :meth:`withdraw`.
        """
        announcement = object()
        with self._changed:
            self._announced.add(announcement)
        return announcement

    def withdraw(self, announcement: object) -> None:
        """Say that nobody need wait for an announced job; nothing if it was submitted or withdrawn."""
        if announcement in self._announced:
            with self._changed:
                self._announced.discard(announcement)
                if not self._announced:
                    self._changed.notify()

    def submit(
        self, texts: Sequence[TokenizedText], *, encoder: Encodes, context: JobContext = NO_CONTEXT
    ) -> Future[Encoded]:
        """Queue one job.

        The future fails with :class:`TextError` when the engine cannot embed one of its texts, with
        :class:`DeviceBroken` when that is the device's fault, with :class:`Unwanted` when the job was
        given up, and with :class:`Drained` when the worker stops before the job has begun.

        Args:
            texts: what to embed; at least one.
            encoder: the engine that tokenized them; its ``encode`` is called on the thread only.
            context: what the caller knows of the job.
        """
        job = Job.of(texts, encoder, arrived_s=self._clock(), context=context)
        with self._changed:
            self._announced.discard(context.announcement)
            if self._draining or self._closed:
                job.future.set_exception(Drained())
                return job.future
            idle = not self._jobs
            self._jobs.append(job)
            self._texts += len(job.lengths)
            self._tokens += sum(job.lengths)
            if idle or not self._announced or self._limits.are_reached(self._texts, self._tokens):
                self._changed.notify()
        return job.future

    def call(self, function: Callable[[], Answer]) -> Future[Answer]:
        """Run ``function`` on the thread that may use the engine, before the next batch.

        The future fails with :class:`Drained` when the worker stops before that.
        """
        call = EngineCall(function)
        with self._changed:
            if self._draining or self._closed:
                call.future.set_exception(Drained())
            else:
                self._calls.append(call)
                self._changed.notify()
        return call.future

    def drain(self) -> None:
        """Fail every job and call that has not begun, and refuse new ones; begun jobs finish."""
        with self._changed:
            self._draining = True
            not_begun = [job for job in self._jobs if not job.begun]
            for job in not_begun:
                self._remove(job)
            calls, self._calls = self._calls, []
            self._changed.notify()
        for future in [*(job.future for job in not_begun), *(call.future for call in calls)]:
            fail(future, Drained())

    def close(self, timeout_s: float) -> None:
        """Finish what has begun and stop the thread."""
        self.drain()
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout_s)

    # The thread.

    def _run(self) -> None:
        while (rows := self._await_batch()) is not None:
            try:
                self._compute(rows)
            except Exception as error:  # noqa: BLE001 - without this thread every later task hangs
                self._give_up_all(rows, partial(TextError, cause=error))
            del rows  # or the thread, while it waits, would keep a model that was evicted in memory

    def _await_batch(self) -> list[BatchRow] | None:
        """Wait for a batch that is due, running calls; None when closed and nothing is left."""
        while True:
            with self._changed:
                calls, self._calls = self._calls, []
                pause = self._pause_s()
                if not calls and pause != 0:
                    if pause is None and self._closed:
                        return None
                    self._changed.wait(pause)
                    continue
            self._run_calls(calls)
            # A call may have taken long: whether a batch is due is asked again.
            if not calls and (rows := self._take_batch()):
                return rows

    def _pause_s(self) -> float | None:
        """Return for how long to wait for more rows; None if none wait."""
        if not self._jobs:
            return None
        return pause_s(
            texts=self._texts,
            tokens=self._tokens,
            oldest_age_s=self._clock() - self._jobs[0].arrived_s,
            more_announced=bool(self._announced),
            limits=self._limits,
        )

    def _run_calls(self, calls: list[EngineCall[Any]]) -> None:
        for call in calls:
            with watched(self._batch_timeout_s):
                call.run()

    def _take_batch(self) -> list[BatchRow]:
        # Not under the lock, because `is_wanted` is the caller's code.
        for job in self._jobs.copy():
            if not job.is_wanted():
                self._give_up(job, Unwanted())
        with self._changed:
            if not self._jobs:
                return []
            self._limits = self._budget.at(self._clock())
            rows = take_batch(self._jobs, self._limits)
            self._texts -= len(rows)
            self._tokens -= sum(text.tokens for _, text, _ in rows)
            return rows

    def _compute(self, rows: list[BatchRow]) -> None:
        texts, encoder = [row.text for row in rows], rows[0].job.encoder
        began_s = self._clock()
        outcome = encode_by_halves(partial(self._encode, encoder), texts, encoder.info.width)
        ended_s = self._clock()
        self._on_batch(
            Batch(
                texts=len(texts),
                tokens=sum(text.tokens for text in texts),
                errors=len(outcome.errors),
                compute_s=ended_s - began_s,
                retried=outcome.too_large is not None,
                space=encoder.info.space,
            )
        )
        if outcome.too_large is not None:
            self._budget = self._budget.out_of_memory(outcome.too_large, ended_s)
            logger.warning(OUT_OF_MEMORY, outcome.too_large, self._budget.lowered_to)
        if all(is_out_of_memory(error) for error in outcome.errors.values()) or self._device_works():
            self._settle(rows, outcome, ended_s - began_s, ended_s)
        else:
            # The other vectors are not to be trusted either; a job is told of a text that failed.
            failed = [row for index, row in enumerate(rows) if index in outcome.errors]
            self._give_up_all([*failed, *rows], DeviceBroken)

    def _encode(self, encoder: Encodes, texts: Sequence[TokenizedText]) -> Floats:
        with watched(self._batch_timeout_s):
            return encoder.encode(texts)

    def _device_works(self) -> bool:
        """Ask anew after each failure: a device that worked a moment ago may not do so now."""
        if self._self_check is None:
            return True
        try:
            with watched(self._batch_timeout_s):
                return self._self_check()
        except Exception:
            logger.exception("the device's own check raised")
            return False

    def _settle(self, rows: list[BatchRow], outcome: Outcome, compute_s: float, ended_s: float) -> None:
        """Store a batch's vectors in its jobs; finish those that have all of theirs."""
        touched: dict[Job, None] = {}
        for index, (job, _, position) in enumerate(rows):
            if index in outcome.errors:
                self._give_up(job, TextError(position, outcome.errors[index]))
            else:
                touched[job] = None
                job.store(position, outcome.rows[index])
        for job in touched:
            job.finish_batch(compute_s, ended_s)

    def _give_up_all(self, rows: list[BatchRow], error_at: Callable[[int], Exception]) -> None:
        for job, _, position in rows:
            self._give_up(job, error_at(position))

    def _give_up(self, job: Job, error: Exception) -> None:
        """Fail a job as a whole: its other texts need not be computed."""
        with self._changed:
            if job in self._jobs:
                self._remove(job)
        fail(job.future, error)

    def _remove(self, job: Job) -> None:
        self._jobs.remove(job)
        self._texts -= len(job.lengths)
        self._tokens -= sum(job.lengths)
