"""What is asked of the batcher: jobs, which are the rows of a call, and functions for its thread."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

if TYPE_CHECKING:
    from sutra_tasks.engines.encoder import ModelInfo, TokenizedText
    from sutra_tasks.vectors import Floats

__all__ = [
    "NO_CONTEXT",
    "Batch",
    "BatchRow",
    "DeviceBroken",
    "Drained",
    "Encoded",
    "Encodes",
    "EngineCall",
    "Job",
    "JobContext",
    "TextError",
    "Unwanted",
    "fail",
]

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")


class Drained(Exception):  # noqa: N818 - not an error: the work goes back to the queue
    """The worker is stopping, and this job had not begun."""


class Unwanted(Exception):  # noqa: N818 - not an error: nobody waits for the answer any more
    """The job was revoked or expired before it was finished."""


class DeviceBroken(Exception):  # noqa: N818 - as Drained: another device can do the work
    """The engine failed on one text of a job, and the device failed its own check as well."""

    def __init__(self, position: int) -> None:
        super().__init__(position)
        self.position = position


class TextError(Exception):
    """The engine failed on one text of a job."""

    def __init__(self, position: int, cause: Exception) -> None:
        super().__init__(position, cause)
        self.position, self.cause = position, cause


class Encodes(Protocol):
    """What the batcher asks of an engine."""

    info: ModelInfo

    def encode(self, batch: Sequence[TokenizedText]) -> Floats:
        """Return float32 rows of shape (len(batch), width)."""


@dataclass(frozen=True, slots=True)
class JobContext:
    """What the sender of a job knows of it.

    Attributes:
        is_wanted: whether to compute it still. The batcher asks before each batch until the job's last
            text is in one, on its own thread, so the answer must be quick. One that raises is logged,
            counts as yes, and is not asked again.
        announcement: from :meth:`Batcher.announce`, if the job was announced; submitting the job
            withdraws it.
    """

    is_wanted: Callable[[], bool] = lambda: True
    announcement: object = None


NO_CONTEXT: Final = JobContext()
"""Of a job that was not announced and cannot be revoked."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A finished job: float32 rows of shape (texts, width), in the order its texts were submitted.

    ``queue_s`` are the seconds it waited, ``compute_s`` those of the batches that it had a part in.
    """

    rows: Floats
    queue_s: float
    compute_s: float


@dataclass(frozen=True, slots=True)
class Batch:
    """What was measured of one batch.

    Attributes:
        texts: how many it had.
        tokens: of all its texts, without padding.
        errors: texts that the engine could not embed.
        compute_s: seconds of computing, with every retry.
        retried: whether it ran out of memory, so that ``compute_s`` says nothing about its speed.
        space: the embedding space of the model that computed it.
    """

    texts: int
    tokens: int
    errors: int
    compute_s: float
    retried: bool = False
    space: str = ""


@dataclass(slots=True, eq=False, kw_only=True)
class Job:
    """One job in the batcher.

    Attributes:
        texts: those that still wait for a batch, sorted by length.
        lengths: their tokens.
        order: at which position each was submitted.
        encoder: the engine that tokenized them and computes them.
        rows: the vectors, of shape (submitted texts, width); those of ``missing`` texts mean nothing.
        arrived_s: when it was submitted, by the batcher's clock.
        context: what its sender knows of it.
        begun: whether one of its texts was in a batch.
        overtaken: whether another job's batch, which did not finish that job, was computed meanwhile.
    """

    texts: list[TokenizedText]
    lengths: list[int]
    order: list[int]
    encoder: Encodes
    rows: Floats
    arrived_s: float
    context: JobContext
    missing: int
    begun: bool = False
    overtaken: bool = False
    compute_s: float = 0.0
    future: Future[Encoded] = field(default_factory=Future)

    @classmethod
    def of(
        cls,
        texts: Sequence[TokenizedText],
        encoder: Encodes,
        *,
        arrived_s: float = 0.0,
        context: JobContext = NO_CONTEXT,
    ) -> Job:
        """Return the job of texts of which none was in a batch; see the attributes."""
        lengths = [text.tokens for text in texts]
        order = sorted(range(len(texts)), key=lengths.__getitem__)
        return cls(
            texts=[texts[i] for i in order],
            lengths=sorted(lengths),
            order=order,
            encoder=encoder,
            rows=np.empty((len(texts), encoder.info.width), dtype=np.float32),
            arrived_s=arrived_s,
            context=context,
            missing=len(texts),
        )

    def is_wanted(self) -> bool:
        """Return whether to compute it still."""
        try:
            return self.context.is_wanted()
        except Exception:
            logger.exception("a job could not say whether it is still wanted")
            self.context = NO_CONTEXT
            return True

    def take(self, where: range) -> list[BatchRow]:
        """Remove waiting texts, which are in a batch now.

        Args:
            where: their places in ``lengths``.
        """
        taken = [BatchRow(self, self.texts[i], self.order[i]) for i in where]
        part = slice(where.start, where.stop)
        del self.texts[part], self.lengths[part], self.order[part]
        self.begun = True
        return taken

    def store(self, position: int, row: Floats) -> None:
        """Store the vector of the text that was submitted at ``position``."""
        self.rows[position] = row
        self.missing -= 1

    def finish_batch(self, compute_s: float, now_s: float) -> None:
        """Count the seconds of a batch that had some of the texts; set the result if none is missing."""
        self.compute_s += compute_s
        if not self.missing and not self.future.done():
            queue_s = max(0.0, now_s - self.arrived_s - self.compute_s)
            self.future.set_result(Encoded(self.rows, queue_s, self.compute_s))


class BatchRow(NamedTuple):
    """One text of a batch, with its job and the position at which the job had it."""

    job: Job
    text: TokenizedText
    position: int


@dataclass(frozen=True, slots=True, eq=False)
class EngineCall(Generic[Answer]):
    """A function to run on the thread that may use the engine, and the future of its result."""

    function: Callable[[], Answer]
    future: Future[Answer] = field(default_factory=Future)

    def run(self) -> None:
        """Run the function, unless the future was cancelled; what it raises goes into the future."""
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            answer = self.function()
        except Exception as error:  # noqa: BLE001 - it belongs to the caller
            self.future.set_exception(error)
        else:
            self.future.set_result(answer)


def fail(future: Future[Any], error: Exception) -> None:
    """Set ``error`` on a future; does nothing if the future is already done.

    Draining and the batcher's thread may both give up the same job.
    """
    with suppress(InvalidStateError):
        future.set_exception(error)
