"""What a producer does next: it forms batches, waits for a full stream, and throttles itself. No I/O.

The server decides in the script that adds a batch how many of its entries the stream takes, so a stream
never exceeds its capacity, and it answers how full the stream is.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from sutra_tasks import keys, lua
from sutra_tasks.errors import (
    BackpressureSignal,
    BrokerNotConfiguredError,
    InvalidInputError,
    InvalidOptionError,
    InvalidTextError,
    TooLargeError,
    UnconfirmedEntriesError,
)
from sutra_tasks.settings import settings
from sutra_tasks.streaming.backpressure import pause_s
from sutra_tasks.streaming.client.steps import (
    END,
    REPEAT_S,
    SERVER_ERRORS,
    NextItem,
    RunScript,
    Sleep,
    raise_if_refused,
)
from sutra_tasks.streaming.entries import LOW_PRIORITY, StreamEntry, check_stream

if TYPE_CHECKING:
    from sutra_tasks.settings import Settings
    from sutra_tasks.streaming.client.steps import Steps

__all__ = ["BATCH", "ProducerCore", "UnsentEntries"]

BATCH: Final = 64
BATCH_CHARS: Final = 1_000_000
FREE_SHARE: Final = 0.1
"""A refused producer waits until about this share of the capacity is free."""
RETRY_AFTER_S: Final = (0.02, 1.0)
"""Bounds of that wait."""

ADD_ENTRIES: Final = lua.script(
    "streaming/lua/add_entries",
    LOW_PRIORITY=LOW_PRIORITY,
    LAST_BATCH_S=keys.FORGET_AFTER_S,
    TOTALS_S=keys.REMEMBER_S,
)


@dataclass(frozen=True, slots=True)
class _TimeInProducers:
    """Seconds that a thread or a task has spent in producers, of any stream, and resting in them."""

    total_s: float = 0.0
    resting_s: float = 0.0


_NONE: Final = _TimeInProducers()
_time_in_producers: Final = ContextVar("time_in_producers", default=_NONE)
"""A producer rests for the work of its caller. Time in producers is no work: rests would cause rests,
and a caller that feeds several streams would rest once for each."""


@dataclass(slots=True)
class UnsentEntries:
    """The entries of one call on their way into the stream.

    Attributes:
        source: gives the caller's entries; None once it has ended or failed.
        batch: entries that were taken from ``source`` and are not in the stream.
        accepted: how many entries are in the stream.
        taken: how many valid entries ``source`` gave.
        error: why ``source`` failed; it is raised after the entries before it were added.
        batch_began: when ``batch`` was complete, by the producer's clock.
    """

    source: Iterator[Any] | AsyncIterator[Any] | None
    batch: Sequence[StreamEntry] = ()
    accepted: int = 0
    taken: int = 0
    error: Exception | None = None
    batch_began: float = 0.0


class ProducerCore:
    """The state of one producer, and the steps of its methods."""

    def __init__(
        self,
        stream: str,
        *,
        wait: bool,
        batch: int,
        timeout_s: float | None,
        options: Settings | None,
        clock: Callable[[], float],
    ) -> None:
        """Check the arguments; they are :class:`StreamProducer`'s."""
        self.stream = check_stream(stream)
        if batch < 1:
            raise InvalidOptionError("batch", str(batch), "1 or more")
        self.options = options or settings()
        if self.options.broker_url is None:
            raise BrokerNotConfiguredError
        self.throttle_rate = 1.0
        self._wait, self._batch, self._clock = wait, batch, clock
        self._timeout_s = self.options.stream_timeout_s if timeout_s is None else timeout_s
        self._process, self._name = os.getpid(), uuid.uuid4().hex
        self._batches = self._entries = 0
        self._work_began: tuple[float, _TimeInProducers] | None = (clock(), _time_in_producers.get())

    def send(self, text: str | StreamEntry, fields: dict[str, Any]) -> Steps[str]:
        """Add one text and return its id."""
        entry = self._entry(text if isinstance(text, StreamEntry) else StreamEntry(text, **fields))
        yield from self._add_all(UnsentEntries(None, [entry], batch_began=self._clock()))
        return str(entry.id)

    def send_many(self, source: Iterator[Any] | AsyncIterator[Any]) -> Steps[int]:
        """Add all entries of ``source`` and return how many they were."""
        unsent = UnsentEntries(source)
        yield from self._add_all(unsent)
        return unsent.accepted

    def add_until_refused(self, unsent: UnsentEntries) -> Steps[BackpressureSignal | None]:
        """Add entries until the stream refuses one; return a signal then, and None when all are added.

        Raises:
            StreamFaultError: the server refuses the entries for good.
            UnconfirmedEntriesError: the server did not answer.
            Exception: from the source, after the entries before it were added.
        """
        while True:
            if not unsent.batch:
                yield from self._fill(unsent)
            if not unsent.batch:
                break
            signal = yield from self._add(unsent)
            if signal is not None:
                return signal
        if unsent.error is not None:
            raise unsent.error
        return None

    def _add_all(self, unsent: UnsentEntries) -> Steps[None]:
        """Add entries, and wait while the stream refuses them; raise the signal after the timeout."""
        while (signal := (yield from self.add_until_refused(unsent))) is not None:
            left_s = unsent.batch_began + self._timeout_s - self._clock()
            if not self._wait or left_s <= 0:
                raise signal
            yield from self._rest(min(signal.retry_after_s, left_s))

    def _fill(self, unsent: UnsentEntries) -> Steps[None]:
        """Take a batch from the source, which may run out or fail."""
        if unsent.source is None:
            return
        batch: list[StreamEntry] = []
        chars = 0
        step = NextItem(unsent.source)
        try:
            while len(batch) < self._batch and chars < BATCH_CHARS:
                given = yield step
                if given is END:
                    unsent.source = None
                    break
                entry = self._entry(given, unsent.taken)
                unsent.taken += 1
                batch.append(entry)
                chars += len(entry.text)
        except Exception as error:  # noqa: BLE001 - of the caller's iterable, or an invalid entry
            unsent.source, unsent.error = None, error
        unsent.batch, unsent.batch_began = batch, self._clock()

    def _leave_parent(self) -> None:
        """Take another name in a forked child, or the server takes its batches for the parent's."""
        if os.getpid() != self._process:
            self._process, self._name = os.getpid(), uuid.uuid4().hex

    def _entry(self, given: str | StreamEntry, position: int | None = None) -> StreamEntry:
        """Return a valid entry with an id.

        Args:
            given: by the caller.
            position: among the entries of the call; None: it is the only one.
        """
        self._leave_parent()
        entry = given if isinstance(given, StreamEntry) else StreamEntry(given)
        try:
            entry = entry.checked(self.options.max_text_chars)
        except InvalidInputError as error:
            raise error if position is None else _numbered(error, position) from None
        if entry.id is not None:
            return entry
        self._entries += 1
        return replace(entry, id=f"{self._name}-{self._entries}")

    def _add(self, unsent: UnsentEntries) -> Steps[BackpressureSignal | None]:
        """Rest as the throttle asks, then add the batch; return a signal if some of it was refused."""
        rest_s = self._pause_s()
        if rest_s > 0:
            yield from self._rest(rest_s)
        began = self._clock()
        added, size, capacity, throttle_rate, per_s = yield from self._answer(unsent.batch)
        self._leave_producer(began)
        self.throttle_rate = float(throttle_rate)
        unsent.accepted += added
        unsent.batch = unsent.batch[added:]
        if not unsent.batch:
            self._work_began = self._clock(), _time_in_producers.get()
            return None
        self._work_began = None  # the caller of a producer that was refused waits
        free_s = FREE_SHARE * capacity / float(per_s) if float(per_s) else REPEAT_S
        least_s, most_s = RETRY_AFTER_S
        retry_after_s = min(most_s, max(least_s, free_s))
        return BackpressureSignal(size, capacity, self.throttle_rate, retry_after_s, unsent.accepted)

    def _answer(self, entries: Sequence[StreamEntry]) -> Steps[Any]:
        """Send a batch until the server answers; its refusal is raised at once."""
        step = self._request(entries)
        deadline = self._clock() + self._timeout_s
        while True:
            try:
                return (yield step)
            except SERVER_ERRORS as error:
                raise_if_refused(self.stream, error)
                if self._clock() >= deadline:
                    ids = [str(entry.id) for entry in entries]
                    raise UnconfirmedEntriesError(ids, str(error)) from None
            yield Sleep(REPEAT_S)

    def _request(self, entries: Sequence[StreamEntry]) -> RunScript:
        """Return the step that adds a batch; the server knows a repeated step by the batch's number."""
        self._leave_parent()
        self._batches += 1
        fields = [entry.fields() for entry in entries]
        return RunScript(
            ADD_ENTRIES,
            {
                "entries": keys.stream(self.stream, "in"),
                "closed_entries": keys.stream(self.stream, "closed"),
                "state": keys.stream(self.stream, "state"),
                "last_batch": keys.stream(self.stream, f"by:{self._name}"),
                "streams": keys.streams(),
                "totals": keys.stream(self.stream, "totals"),
                "stream": self.stream,
                "batch": self._batches,
                "default_capacity": self.options.stream_buffer_size,
                "priorities": [entry.priority for entry in entries],
                "field_counts": [len(one) for one in fields],
                "fields": [value for one in fields for value in one],
            },
        )

    def _pause_s(self) -> float:
        """Return how long to rest before a batch, for the work that its texts took the caller."""
        if self._work_began is None:
            return 0.0
        began, before = self._work_began
        now = _time_in_producers.get()
        # Clamped at 0: a producer that another thread goes on with sees that thread's smaller sums.
        away_s = max(0.0, now.total_s - before.total_s)
        rested_s = max(0.0, now.resting_s - before.resting_s)
        own_s = min(self._clock() - began - away_s, keys.STATE_S)  # an idle hour is no work
        return max(0.0, pause_s(own_s, self.throttle_rate) - rested_s)

    def _rest(self, seconds: float) -> Steps[None]:
        began = self._clock()
        yield Sleep(seconds)
        self._leave_producer(began, rested=True)

    def _leave_producer(self, began: float, *, rested: bool = False) -> None:
        """Count the time since ``began`` as time in producers."""
        passed_s = self._clock() - began
        now = _time_in_producers.get()
        _time_in_producers.set(
            _TimeInProducers(now.total_s + passed_s, now.resting_s + (passed_s if rested else 0.0))
        )


def _numbered(error: InvalidInputError, position: int) -> InvalidInputError:
    """Return the error of an entry with its position among those of the call."""
    match error:
        case InvalidTextError(reason=reason):
            return InvalidTextError(position, reason)
        case TooLargeError(size=size, limit=limit, setting=setting):
            return TooLargeError(f"characters in texts[{position}]", size, limit, setting)
        case InvalidOptionError(option=option, value=value, expected=expected):
            return InvalidOptionError(f"{option} of texts[{position}]", value, expected)
    return error
