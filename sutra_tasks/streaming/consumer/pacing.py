"""How much a device takes from its streams now, and how long it waits before it looks again.

Pure. A device takes no more than a few batches, so that its tasks are not held up and other devices find
work, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

__all__ = [
    "Wait",
    "delivery",
    "entries_of_stream",
    "entries_to_take",
    "growing_pause_s",
    "next_wait",
    "until_full_s",
]

AHEAD_BATCHES: Final = 2
"""Batches that wait in the batcher, so that the engine never waits; it may compute both at once."""
MOST_BATCHES: Final = 8
"""Batches that wait, are computed, or are being committed."""
IDLE_S: Final = 0.2
"""Seconds after which texts and silent consumers are looked for, though no entry arrived."""
OPEN_TEXT_S: Final = 0.01
"""The same while the device has an open text: its next chunk may be complete once it is committed."""
POLL_S: Final = 0.02
"""Seconds between two reads while a batch forms or the engine is busy."""
SERVER_RETRY_S: Final = 0.5
"""Seconds after which a server that failed is asked again; they grow with each failure in a row."""
MOST_SERVER_RETRY_S: Final = 2.0
SUSPECT_DELIVERIES: Final = 1
"""Deliveries without an answer from which on an entry or text may have ended its workers."""


def entries_to_take(size: int, *, waiting: int, in_flight: int, forming: int) -> int:
    """Return how many entries to take now; none if it is negative.

    Args:
        size: entries in a full batch.
        waiting: texts that wait in the batcher, those of tasks included.
        in_flight: rows of streams that wait, are computed, or are being committed.
        forming: entries that were taken and are in no batch yet.
    """
    ahead = AHEAD_BATCHES * size - waiting
    least = size - in_flight  # one batch of streams, however many texts of tasks wait
    most = MOST_BATCHES * size - in_flight
    return min(most, max(ahead, least)) - forming


def entries_of_stream(free: int, size: int, streams: int) -> int:
    """Return how many of ``free`` entries to take from the next stream: its share, or a full batch."""
    return min(free, max(size, free // streams))


def growing_pause_s(failures: int, first_s: float, most_s: float) -> float:
    """Return the seconds to wait after so many failures in a row, 1 or more: each time twice as long."""
    return min(most_s, first_s * 2.0 ** min(failures - 1, 30))


def delivery(deliveries: int, most: int) -> Literal["batch", "alone", "dead letter"]:
    """Return what becomes of an entry or text that was delivered before without an answer.

    Args:
        deliveries: how often.
        most: deliveries at which it is given up.
    """
    if deliveries < SUSPECT_DELIVERIES:
        return "batch"
    return "dead letter" if deliveries >= most else "alone"


def until_full_s(oldest_age_s: float | None, max_latency_s: float, most_s: float) -> float:
    """Return the seconds until a forming batch must go, ``most_s`` at most.

    Args:
        oldest_age_s: how long the batch's oldest entry has waited; None: no batch forms.
        max_latency_s: how long it may wait.
        most_s: seconds to wait at most.
    """
    if oldest_age_s is None:
        return most_s
    return min(most_s, max(0.001, max_latency_s - oldest_age_s))


@dataclass(frozen=True, slots=True)
class Wait:
    """What a device waits for before it reads again.

    Attributes:
        event: ``progress``: a batch is computed or committed; ``stop``: nothing but the end of the
            worker; ``entry``: the next entry of any stream.
        most_s: seconds to wait at most.
    """

    event: Literal["progress", "stop", "entry"]
    most_s: float


def next_wait(
    *, free: int, in_flight: int, has_texts: bool, forming: int, streams: int, empty_streams: int
) -> Wait:
    """Return how to wait after a round of reads that found nothing.

    Args:
        free: entries that may still be taken.
        in_flight: rows of streams that wait, are computed, or are being committed.
        has_texts: whether this device has an open text, or committed one in this round.
        forming: entries that were taken and are in no batch yet.
        streams: the streams that were read; those with a fault are not.
        empty_streams: those of them that have no entry and can be waited for.
    """
    if free <= 0 or in_flight:
        # The engine is busy: entries that arrive meanwhile are read together, each read takes its time.
        return Wait("progress", POLL_S)
    if has_texts:
        return Wait("stop", OPEN_TEXT_S)
    if not streams:
        return Wait("stop", POLL_S if forming else IDLE_S)
    if forming or empty_streams < streams:
        # Not on the server: it checks the end of a wait only ten times a second.
        return Wait("stop", POLL_S)
    return Wait("entry", IDLE_S)
