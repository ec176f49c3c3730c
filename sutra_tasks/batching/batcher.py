"""The thread that feeds the engine: it collects jobs, asks for the next batch, and settles futures."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from sutra_tasks.batching.jobs import (
    Batch,
    DeviceBroken,
    Drained,
    Encoded,
    Encodes,
    Submitted,
    TextError,
    Unwanted,
    fail,
)
from sutra_tasks.batching.next_batch import (
    Budget,
    Limits,
    encode_by_halves,
    pause_s,
    take,
)
from sutra_tasks.batching.watchdog import watched
from sutra_tasks.engines.out_of_memory import is_out_of_memory

if TYPE_CHECKING:
    from sutra_tasks.engines.encoder import TokenizedText
    from sutra_tasks.vectors import Floats

__all__ = ["Batch", "Batcher", "DeviceBroken", "Drained", "Encoded", "Encodes", "TextError", "Unwanted"]

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")


class Batcher:
    """Runs one device's models on one thread, in batches drawn from everything submitted.

    A batch is one model's. A job is computed by the engine it was submitted with, so a model that is
    replaced finishes what was tokenised for it.
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
            self_check: says whether the device works. Asked on the thread when a batch had errors that
                are not for want of memory; if it says no, every job of the batch fails with
                :class:`DeviceBroken`. One that raises has failed; without one the text is at fault.
            batch_timeout_s: when one call of the engine, ``self_check`` or a called function takes
                longer, the *process* ends, with all stacks on its standard error. None: never.
            clock: seconds that never go back.
        """
        self._on_batch, self._clock = on_batch, clock
        self._self_check, self._batch_timeout_s = self_check, batch_timeout_s
        self._budget, self._limits = Budget(limits), limits
        self._changed = threading.Condition()
        self._jobs: list[Submitted] = []
        self._calls: list[tuple[Future[Any], Callable[[], Any]]] = []
        self._arriving = 0
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

    def announce(self) -> None:
        """Say that a job is on its way, so that a batch with room may wait for it."""
        with self._changed:
            self._arriving += 1

    def arrived(self) -> None:
        """Say that an announced job was submitted, or will not be."""
        with self._changed:
            self._arriving -= 1
            if not self._arriving:
                self._changed.notify()

    def submit(
        self,
        texts: Sequence[TokenizedText],
        *,
        encoder: Encodes,
        alone: bool = False,
        wanted: Callable[[], bool] = lambda: True,
    ) -> Future[Encoded]:
        """Queue one job.

        The future fails with :class:`TextError` when the engine cannot embed one of its texts, with
        :class:`DeviceBroken` when that is the device's fault, with :class:`Unwanted` when the job was
        given up, and with :class:`Drained` when the worker stops before the job has begun.

        Args:
            texts: what to embed.
            encoder: the engine that tokenised them; its ``encode`` is called on the thread only.
            alone: share no batch with other jobs.
            wanted: asked before each batch until the job's last text is in one, on the batcher's thread;
                quick. One that raises is logged, counts as wanted, and is not asked again.
        """
        lengths = [text.tokens for text in texts]
        order = sorted(range(len(texts)), key=lengths.__getitem__)
        job = Submitted(
            texts=[texts[i] for i in order],
            order=order,
            lengths=sorted(lengths),
            alone=alone,
            engine=encoder,
            pads=not encoder.info.is_static,
            rows=np.empty((len(texts), encoder.info.width), dtype=np.float32),
            arrived_s=self._clock(),
            wanted=wanted,
            missing=len(texts),
        )
        with self._changed:
            if self._draining or self._closed:
                job.future.set_exception(Drained())
                return job.future
            idle = not self._jobs
            self._jobs.append(job)
            self._texts += len(texts)
            self._tokens += sum(lengths)
            if idle or self._is_full():
                self._changed.notify()
        return job.future

    def call(self, function: Callable[[], Answer]) -> Future[Answer]:
        """Run ``function`` on the thread that may use the engine, before the next batch.

        The future fails with :class:`Drained` when the worker stops before that.
        """
        future: Future[Answer] = Future()
        with self._changed:
            if self._draining or self._closed:
                future.set_exception(Drained())
                return future
            self._calls.append((future, function))
            self._changed.notify()
        return future

    def drain(self) -> None:
        """Give back every job and call that has not begun, and refuse new ones; begun jobs finish."""
        with self._changed:
            self._draining = True
            given_back = [job for job in self._jobs if not job.begun]
            for job in given_back:
                self._remove(job)
            calls, self._calls = self._calls, []
            self._changed.notify()
        for future in [*(job.future for job in given_back), *(future for future, _ in calls)]:
            fail(future, Drained())

    def close(self, timeout_s: float) -> None:
        """Finish what has begun and stop the thread."""
        self.drain()
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout_s)

    def _is_full(self) -> bool:
        return self._texts >= self._limits.max_texts or self._tokens >= self._limits.max_tokens

    def _remove(self, job: Submitted) -> None:
        self._jobs.remove(job)
        self._texts -= len(job.lengths)
        self._tokens -= sum(job.lengths)

    def _run(self) -> None:
        while (taken := self._next()) is not None:
            self._settle(taken)
            del taken  # or the thread, while it waits, would keep a model that left in memory

    def _settle(self, taken: list[tuple[Submitted, TokenizedText, int]]) -> None:
        try:
            self._compute(taken)
        except Exception as error:  # noqa: BLE001 - without this thread every later task hangs
            for job, _, position in taken:
                self._give_up(job, TextError(position, error))

    def _next(self) -> list[tuple[Submitted, TokenizedText, int]] | None:
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
            self._answer_all(calls)
            # A call may have taken long: whether a batch is due is asked again.
            if not calls and (taken := self._take()):
                return taken

    def _pause_s(self) -> float | None:
        if not self._jobs:
            return None
        return pause_s(
            texts=self._texts,
            tokens=self._tokens,
            oldest_age_s=self._clock() - self._jobs[0].arrived_s,
            more_arriving=self._arriving > 0,
            limits=self._limits,
        )

    def _answer_all(self, calls: list[tuple[Future[Any], Callable[[], Any]]]) -> None:
        for future, function in calls:
            self._answer(future, function)

    def _answer(self, future: Future[Answer], function: Callable[[], Answer]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            with watched(self._batch_timeout_s):
                answer = function()
        except Exception as error:  # noqa: BLE001 - it belongs to who called
            future.set_exception(error)
        else:
            future.set_result(answer)

    def _take(self) -> list[tuple[Submitted, TokenizedText, int]]:
        # Not under the lock: `wanted` is somebody else's code.
        for job in self._jobs.copy():
            if not job.is_wanted():
                self._give_up(job, Unwanted())
        with self._changed:
            if not self._jobs:
                return []
            self._limits = self._budget.at(self._clock())
            taken = take(self._jobs, self._limits)
            self._texts -= len(taken)
            self._tokens -= sum(text.tokens for _, text, _ in taken)
            return taken

    def _compute(self, taken: list[tuple[Submitted, TokenizedText, int]]) -> None:
        texts = [text for _, text, _ in taken]
        encoder: Encodes = taken[0][0].engine
        began = self._clock()
        outcome = encode_by_halves(partial(self._encode, encoder), texts, encoder.info.width)
        compute_s = self._clock() - began
        tokens = sum(text.tokens for text in texts)
        retried = outcome.too_large is not None
        errors, space = len(outcome.errors), encoder.info.space
        self._on_batch(Batch(len(texts), tokens, errors, compute_s, retried, space))
        if outcome.too_large is not None:
            self._budget = self._budget.out_of_memory(outcome.too_large, self._clock())
            logger.warning(
                "out of memory at %d padded tokens: batches hold %d for now",
                outcome.too_large,
                self._budget.lowered_to,
            )
        suspicious = not all(is_out_of_memory(error) for error in outcome.errors.values())
        if suspicious and not self._device_works():
            # Not even the other rows of this batch are to be believed.
            for index, (job, _, position) in enumerate(taken):
                if index in outcome.errors:
                    self._give_up(job, DeviceBroken(position))
            for job, _, position in taken:
                self._give_up(job, DeviceBroken(position))
            return
        touched: dict[Submitted, None] = {}
        for index, (job, _, position) in enumerate(taken):
            if index in outcome.errors:
                self._give_up(job, TextError(position, outcome.errors[index]))
                continue
            touched[job] = None
            job.rows[position] = outcome.rows[index]
            job.missing -= 1
        for job in touched:
            job.compute_s += compute_s
            if job.missing == 0 and not job.future.done():
                queue_s = max(0.0, began + compute_s - job.arrived_s - job.compute_s)
                job.future.set_result(Encoded(job.rows, queue_s, job.compute_s))

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

    def _give_up(self, job: Submitted, error: Exception) -> None:
        """Fail a job as a whole: its other texts need not be computed."""
        with self._changed:
            if job in self._jobs:
                self._remove(job)
        fail(job.future, error)
