"""The thread that feeds the engine: it collects jobs, asks for the next batch, and settles futures."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from sutra_tasks.encoding.batching import Limits, Waiting, next_batch, pause_s

if TYPE_CHECKING:
    from sutra_tasks.encoding.encoder import Encoder, TokenizedText
    from sutra_tasks.vectors import Floats

__all__ = ["Batch", "Batcher", "Drained", "Encoded", "TextError"]


class Drained(Exception):  # noqa: N818 - not an error: the work goes back to the queue
    """The worker is stopping, and this job had not begun."""


class TextError(Exception):
    """The engine failed on one text of a job."""

    def __init__(self, position: int, cause: Exception) -> None:
        super().__init__(position, cause)
        self.position, self.cause = position, cause


@dataclass(frozen=True, slots=True)
class Encoded:
    """A finished job: float32 rows in the order its texts were submitted."""

    rows: Floats
    queue_s: float
    compute_s: float


@dataclass(frozen=True, slots=True)
class Batch:
    """What one batch was, for statistics."""

    texts: int
    tokens: int
    errors: int
    compute_s: float


@dataclass(slots=True, eq=False)
class _Job:
    """One submission, its texts sorted by length; ``order[i]`` is where text i stood."""

    texts: list[TokenizedText]
    order: list[int]
    lengths: list[int]
    rows: Floats
    arrived: float
    begun: bool = False
    overtaken: bool = False
    compute_s: float = 0.0
    missing: int = 0
    future: Future[Encoded] = field(default_factory=Future)


class Batcher:
    """Runs ``encoder`` on one thread, in batches drawn from everything submitted."""

    def __init__(
        self,
        encoder: Encoder,
        limits: Limits,
        *,
        on_batch: Callable[[Batch], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._encoder, self._limits, self._on_batch, self._clock = encoder, limits, on_batch, clock
        self._changed = threading.Condition()
        self._jobs: list[_Job] = []
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

    def submit(self, texts: Sequence[TokenizedText]) -> Future[Encoded]:
        """Queue one job.

        The future fails with :class:`TextError` when the engine cannot embed one of its texts, and
        with :class:`Drained` when the worker stops before the job has begun.
        """
        lengths = [text.tokens for text in texts]
        order = sorted(range(len(texts)), key=lengths.__getitem__)
        job = _Job(
            texts=[texts[i] for i in order],
            order=order,
            lengths=sorted(lengths),
            rows=np.empty((len(texts), self._encoder.card.width), dtype=np.float32),
            arrived=self._clock(),
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

    def drain(self) -> None:
        """Give back every job that has not begun, and refuse new ones; begun jobs finish."""
        with self._changed:
            self._draining = True
            given_back = [job for job in self._jobs if not job.begun]
            self._jobs = [job for job in self._jobs if job.begun]
            self._recount()
            self._changed.notify()
        for job in given_back:
            job.future.set_exception(Drained())

    def close(self, timeout_s: float) -> None:
        """Finish what has begun and stop the thread."""
        self.drain()
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout_s)

    def _is_full(self) -> bool:
        return self._texts >= self._limits.max_texts or self._tokens >= self._limits.max_tokens

    def _recount(self) -> None:
        self._texts = sum(len(job.lengths) for job in self._jobs)
        self._tokens = sum(sum(job.lengths) for job in self._jobs)

    def _run(self) -> None:
        while (taken := self._next()) is not None:
            try:
                self._compute(taken)
            except Exception as error:  # noqa: BLE001 - without this thread every later task hangs
                for job, _, position in taken:
                    self._fail(job, TextError(position, error))

    def _next(self) -> list[tuple[_Job, TokenizedText, int]] | None:
        """Wait for a batch that is due; None when closed and nothing is left."""
        with self._changed:
            while True:
                if not self._jobs:
                    if self._closed:
                        return None
                    self._changed.wait()
                    continue
                pause = pause_s(
                    texts=self._texts,
                    tokens=self._tokens,
                    oldest_age_s=self._clock() - self._jobs[0].arrived,
                    more_arriving=self._arriving > 0,
                    limits=self._limits,
                )
                if pause <= 0:
                    return self._take()
                self._changed.wait(pause)

    def _take(self) -> list[tuple[_Job, TokenizedText, int]]:
        plan = next_batch([Waiting(job.lengths, job.overtaken) for job in self._jobs], self._limits)
        unfinished = len(plan.parts[plan.owner]) < len(self._jobs[plan.owner].lengths)
        taken: list[tuple[_Job, TokenizedText, int]] = []
        for job, part in zip(self._jobs, plan.parts, strict=True):
            if not part:
                job.overtaken = job.overtaken or unfinished
                continue
            where = slice(part.start, part.stop)
            taken += [(job, job.texts[i], job.order[i]) for i in part]
            self._texts -= len(part)
            self._tokens -= sum(job.lengths[where])
            del job.texts[where], job.order[where], job.lengths[where]
            job.begun = True
        self._jobs = [job for job in self._jobs if job.lengths]
        return taken

    def _compute(self, taken: list[tuple[_Job, TokenizedText, int]]) -> None:
        began = self._clock()
        rows, errors = self._encode([text for _, text, _ in taken])
        compute_s = self._clock() - began
        lengths = [text.tokens for _, text, _ in taken]
        self._on_batch(
            Batch(
                texts=len(taken),
                tokens=sum(lengths),
                errors=len(errors),
                compute_s=compute_s,
            )
        )
        touched: dict[_Job, None] = {}
        for index, (job, _, position) in enumerate(taken):
            touched[job] = None
            job.missing -= 1
            if index in errors:
                self._fail(job, TextError(position, errors[index]))
            else:
                job.rows[position] = rows[index]
        for job in touched:
            job.compute_s += compute_s
            if job.missing == 0 and not job.future.done():
                queue_s = max(0.0, began + compute_s - job.arrived - job.compute_s)
                job.future.set_result(Encoded(job.rows, queue_s, job.compute_s))

    def _encode(self, texts: list[TokenizedText]) -> tuple[Floats, dict[int, Exception]]:
        """Encode; where that fails, halve until the texts at fault stand alone."""
        width = self._encoder.card.width
        try:
            rows = self._encoder.encode(texts)
            if rows.shape != (len(texts), width):
                raise ValueError(f"the engine gave rows of shape {rows.shape}")  # noqa: TRY301
            return rows, {}
        except Exception as error:  # noqa: BLE001 - whatever an engine raises belongs to its texts
            if len(texts) == 1:
                return np.zeros((1, width), dtype=np.float32), {0: error}
            half = len(texts) // 2
            first, first_errors = self._encode(texts[:half])
            second, second_errors = self._encode(texts[half:])
            moved = {half + index: cause for index, cause in second_errors.items()}
            return np.vstack([first, second]), first_errors | moved

    def _fail(self, job: _Job, error: TextError) -> None:
        if job.future.done():
            return
        with self._changed:
            # Its other texts need not be computed: the task fails as a whole.
            if job in self._jobs:
                self._jobs.remove(job)
                self._recount()
        job.future.set_exception(error)
