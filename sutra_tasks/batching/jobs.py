"""What is asked of a batcher, and what becomes of it: a job, its rows, or why it has none."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from sutra_tasks.batching.next_batch import Job

if TYPE_CHECKING:
    from sutra_tasks.engines.encoder import ModelInfo, TokenizedText
    from sutra_tasks.vectors import Floats

__all__ = [
    "Batch",
    "DeviceBroken",
    "Drained",
    "Encoded",
    "Encodes",
    "Submitted",
    "TextError",
    "Unwanted",
    "fail",
]

logger = logging.getLogger(__name__)


class Drained(Exception):  # noqa: N818 - not an error: the work goes back to the queue
    """The worker is stopping, and this job had not begun."""


class Unwanted(Exception):  # noqa: N818 - not an error: nobody waits for the answer any more
    """The job was given up before it was finished."""


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
class Encoded:
    """A finished job: float32 rows in the order its texts were submitted."""

    rows: Floats
    queue_s: float
    compute_s: float


@dataclass(frozen=True, slots=True)
class Batch:
    """What one batch was, for statistics; a retried one was out of memory first, and took longer.

    ``space`` is the embedding space of the model that computed it.
    """

    texts: int
    tokens: int
    errors: int
    compute_s: float
    retried: bool = False
    space: str = ""


@dataclass(slots=True, eq=False, kw_only=True)
class Submitted(Job):
    """One submission and what has become of it."""

    rows: Floats
    arrived_s: float
    wanted: Callable[[], bool]
    missing: int
    compute_s: float = 0.0
    future: Future[Encoded] = field(default_factory=Future)

    def is_wanted(self) -> bool:
        """Ask whether to go on; who cannot say is not asked again."""
        try:
            return self.wanted()
        except Exception:
            logger.exception("a job could not say whether it is still wanted")
            self.wanted = lambda: True
            return True


def fail(future: Future[Any], error: Exception) -> None:
    """Say why there is no answer, unless that was said."""
    # Draining and the thread may give up the same job: the first has said why.
    with suppress(InvalidStateError):
        future.set_exception(error)
