"""What a device worker does for streams: one thread takes and forms batches, one commits results.

The reader shares the worker's batcher with its tasks, and holds no more than a few batches, so that
neither holds up the other and other devices find work, too. It pulls: a stream balances itself over the
fleet.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
import redis

from sutra_tasks.encoding.batcher import DeviceBroken, Drained, Encoded, TextError
from sutra_tasks.errors import EncodingError, PoisonMessageError
from sutra_tasks.streaming.autobatching import SizeOptimizer, should_trigger
from sutra_tasks.streaming.upkeep import Upkeep
from sutra_tasks.streaming.work import Cutter, Unit, chunk_fields, error_of, response_fields
from sutra_tasks.vectors import finish

if TYPE_CHECKING:
    from sutra_tasks.encoding.batcher import Batcher
    from sutra_tasks.encoding.encoder import Encoder
    from sutra_tasks.settings import Settings
    from sutra_tasks.streaming.store import RawEntry, Server, Stored
    from sutra_tasks.vectors import Floats

__all__ = ["Seat", "StreamConsumer"]

logger = logging.getLogger(__name__)

IN_FLIGHT_BATCHES: Final = 4
"""One computes, one waits, one is being formed, one is being committed."""
IDLE_S: Final = 0.2
"""Seconds after which texts and silent consumers are looked for, though no entry came."""
FULL_S: Final = 0.02
NAMES_S: Final = 0.5
AGAIN_S: Final = 0.5
SUSPECT_AFTER: Final = 1
"""Deliveries from which on an entry may have ended the workers that had it: it is run alone."""


class Seat(Protocol):
    """How a worker's streams share the device with its tasks."""

    def join(self) -> None:
        """Begin to use it, with others."""

    def leave(self) -> None:
        """End that."""

    def alone(self) -> AbstractContextManager[None]:
        """Return a context in which nobody else uses it."""


class _Batch:
    """Units whose rows are computed together."""

    def __init__(self, units: Sequence[Unit], formed_at: float) -> None:
        self.units, self.formed_at = list(units), formed_at
        self.size = sum(max(1, len(unit.rows)) for unit in units)


class StreamConsumer:
    """The streams' part of a device worker."""

    def __init__(
        self,
        server: Server,
        encoder: Encoder,
        batcher: Batcher,
        options: Settings,
        device_id: str,
        *,
        seat: Seat,
        serves: Callable[[], bool],
        load: Callable[[], float],
    ) -> None:
        """Prepare the threads.

        Args:
            server: with the streams.
            encoder: the engine, for tokenising.
            batcher: that computes.
            options: of this deployment.
            device_id: of this device.
            seat: its ``join``, ``leave`` and ``alone`` share the device with tasks.
            serves: whether the device takes work.
            load: of this machine, 0 to 1.
        """
        self._server, self._encoder, self._batcher, self._options = server, encoder, batcher, options
        self._device_id, self._seat, self._serves = device_id, seat, serves
        self._cutter = Cutter(encoder, options)
        self._sizes = SizeOptimizer(options.stream_batch_size, options.batch_texts)
        self._forming: deque[Unit] = deque()
        self._changed = threading.Condition()
        self._in_flight = 0
        self._held: dict[Unit, None] = {}
        self._done: queue.SimpleQueue[tuple[_Batch, Future[Encoded] | None]] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._ended = threading.Event()
        self._streams: list[str] = []
        self._named_at = self._claimed_at = -float("inf")
        self._backlog = False
        self.upkeep = Upkeep(server, encoder, batcher, options, load)
        self._reader = threading.Thread(target=self._read_all, name="stream-reader", daemon=True)
        self._writer = threading.Thread(target=self._write_all, name="stream-writer", daemon=True)

    def start(self) -> None:
        """Begin to read."""
        self._reader.start()
        self._writer.start()

    def drain(self, timeout_s: float) -> None:
        """Take no more, and give back what has not begun."""
        self._stopping.set()
        with self._changed:
            self._changed.notify_all()
        if self._reader.ident is not None:
            self._reader.join(timeout_s)

    def stop(self, timeout_s: float) -> None:
        """Commit what is computed, and end."""
        with self._changed:
            self._changed.wait_for(lambda: not self._in_flight, timeout_s)
        self._ended.set()
        if self._writer.ident is not None:
            self._writer.join(timeout_s)

    # The reader's thread.

    def _read_all(self) -> None:
        while not self._stopping.is_set():
            try:
                self._step()
            except redis.RedisError as error:
                logger.warning("streams are not read for now: %s", error)
                self._stopping.wait(AGAIN_S)
            except Exception:
                logger.exception("a stream's entries were left to be claimed")
                self._stopping.wait(AGAIN_S)
        self._give_back([unit for unit in self._forming if unit.error is None])
        self._forming.clear()

    def _step(self) -> None:
        now = time.monotonic()
        if now - self._named_at >= NAMES_S:
            self._streams, self._named_at = self._server.streams(), now
        if not self._serves() or not self._streams:
            self._stopping.wait(IDLE_S)
            return
        if now - self._claimed_at >= min(1.0, self._options.stream_claim_s / 2):
            self._claimed_at = now
            self._claim()
        size = self._sizes.size(now, backlog=self._backlog)
        room = IN_FLIGHT_BATCHES * size - self._in_flight - len(self._forming)
        behind: dict[str, bytes] = {}
        found, backlog = 0, room <= 0 and self._backlog
        self._streams = self._streams[1:] + self._streams[:1]
        for stream in self._streams:
            most = min(room, max(size, room // len(self._streams)))
            if most <= 0:
                break
            taken, last = self._take(stream, most)
            found, room, backlog = found + taken, room - taken, backlog or taken >= most
            if last is not None:
                behind[stream] = last
        self._backlog = backlog or self.upkeep.pressed
        self._submit_formed(size)
        if found:
            return
        if self._in_flight and room <= 0:
            with self._changed:
                self._changed.wait(self._until_trigger(FULL_S))
        elif len(behind) == len(self._streams):
            self._server.await_entries(behind, self._until_trigger(IDLE_S))
        else:
            self._stopping.wait(self._until_trigger(FULL_S))

    def _take(self, stream: str, most: int) -> tuple[int, bytes | None]:
        read = self._server.read(
            stream,
            most,
            first_need=self._cutter.first_need,
            most_unread=self._options.stream_output_size,
        )
        now = time.monotonic()
        self._forming.extend(self._cutter.of_entry(stream, raw, now) for raw in read.entries)
        taken = len(read.entries)
        if read.ready:
            lease_s = self._options.stream_claim_s
            texts = self._server.take(
                stream, max(1, most - taken), lease_s=lease_s, most_bytes=self._cutter.most_bytes
            )
            for text in texts:
                if text.attempts > SUSPECT_AFTER:
                    self._run_alone(self._suspect_text(stream, text))
                else:
                    self._forming.append(self._cutter.of_text(stream, text, now))
            taken += len(texts)
        return taken, read.last

    def _until_trigger(self, most_s: float) -> float:
        if not self._forming:
            return most_s
        age_s = time.monotonic() - self._forming[0].taken_at
        return min(most_s, max(0.001, self._options.stream_max_latency_ms / 1000 - age_s))

    def _submit_formed(self, size: int) -> None:
        while self._forming:
            age_ms = 1000 * (time.monotonic() - self._forming[0].taken_at)
            if not should_trigger(
                len(self._forming),
                age_ms,
                batch_size=size,
                max_latency_ms=self._options.stream_max_latency_ms,
            ):
                return
            some = [self._forming.popleft() for _ in range(min(size, len(self._forming)))]
            self._submit(some)

    def _submit(self, units: Sequence[Unit]) -> None:
        batch = self._begin(units)
        rows = [row for unit in units for row in unit.rows]
        if not rows:
            self._done.put((batch, None))
            return
        self._seat.join()
        future = self._batcher.submit(rows)
        future.add_done_callback(lambda done: self._computed(batch, done))

    def _computed(self, batch: _Batch, future: Future[Encoded]) -> None:
        self._seat.leave()
        self._done.put((batch, future))

    def _begin(self, units: Sequence[Unit]) -> _Batch:
        now = time.monotonic()
        self._cutter.tokenize(units)
        batch = _Batch(units, now)
        with self._changed:
            self._in_flight += batch.size
            self._held.update(dict.fromkeys(units))
        return batch

    def _claim(self) -> None:
        """Take over from consumers that fell silent, one entry after the other."""
        for stream in self._streams:
            while not self._stopping.is_set():
                claimed = self._server.claim(stream, self._options.stream_claim_s)
                if not claimed.entries:
                    break
                self.upkeep.claimed(stream, len(claimed.entries))
                for raw in claimed.entries:
                    self._take_over(stream, raw, claimed.deliveries)

    def _take_over(self, stream: str, raw: RawEntry, deliveries: int) -> None:
        unit = self._cutter.of_entry(stream, raw, time.monotonic(), deliveries)
        if deliveries < SUSPECT_AFTER:
            self._forming.append(unit)
        elif deliveries >= self._options.max_attempts:
            unit.error = PoisonMessageError(deliveries, "the workers that took this entry died")
            reason = ["reason", str(unit.error), "deliveries", deliveries]
            logger.error("stream %s, entry %s: %s", stream, unit.source, unit.error)
            self._server.give_up(stream, raw, reason, error_of(unit))
        else:
            self._run_alone(unit)

    def _suspect_text(self, stream: str, text: Any) -> Unit:
        unit = self._cutter.of_text(stream, text, time.monotonic())
        if text.attempts > self._options.max_attempts and unit.error is None:
            error = PoisonMessageError(text.attempts - 1, "the workers that took this text died")
            logger.error("stream %s: a stretch of a text was given up: %s", stream, error)
            unit = self._cutter.without(unit, error)
        if unit.error is not None:
            letter = ["key", text.key, "source", text.source, "position", text.progress.position,
                      "text", text.buffer, "reason", str(unit.error)]  # fmt: skip
            self._server.bury(stream, text, letter)
        return unit

    def _run_alone(self, unit: Unit) -> None:
        """Compute it while nothing else is, so that there is no doubt if this process ends."""
        with self._changed:
            self._changed.wait_for(lambda: not self._in_flight or self._stopping.is_set())
        batch = self._begin([unit])
        if not unit.rows:
            self._done.put((batch, None))
            return
        with self._seat.alone():
            self._server.mark(unit.source)
            try:
                future = self._batcher.submit(unit.rows, alone=True)
                future.exception()
            finally:
                self._server.unmark()
        self._done.put((batch, future))

    # The writer's thread.

    def _write_all(self) -> None:
        while not self._ended.is_set() or not self._done.empty():
            try:
                batch, future = self._done.get(timeout=self.upkeep.pause_s)
            except queue.Empty:
                pass
            else:
                self._settle(batch, future)
            try:
                with self._changed:
                    held = list(self._held)
                self.upkeep.step(self._streams, held)
            except redis.RedisError as error:
                logger.warning("streams are not looked after for now: %s", error)
                self._ended.wait(AGAIN_S)
        self.upkeep.leave()

    def _settle(self, batch: _Batch, future: Future[Encoded] | None) -> None:
        """Commit a batch, or see to it that somebody else can."""
        try:
            rows, computed_at = self._rows_of(future), time.monotonic()
        except TextError as error:
            self._without(batch, error)
        except (Drained, DeviceBroken):
            self._give_back(batch.units)
        else:
            if future is not None:
                self._sizes = self._sizes.measured(batch.size, future.result().compute_s, computed_at)
            self._commit(batch, rows, computed_at)
        self._finished(batch)

    def _rows_of(self, future: Future[Encoded] | None) -> Floats:
        if future is None:
            return np.empty((0, self._encoder.card.width), dtype=np.float32)
        return finish(future.result().rows, dimensions=None, normalize=True).astype("<f4", copy=False)

    def _without(self, batch: _Batch, error: TextError) -> None:
        """Tell of the text at fault; the others are computed once more."""
        position, at_fault = error.position, batch.units[0]
        for unit in batch.units:
            at_fault = unit
            if position < len(unit.rows):
                break
            position -= len(unit.rows)
        # The engine's words may hold the text: only their kind is passed on.
        reason = EncodingError(self._device_id, 0, type(error.cause).__name__)
        at_fault.error, at_fault.rows = reason, []
        self._submit(batch.units)

    def _commit(self, batch: _Batch, rows: Floats, computed_at: float) -> None:
        first = 0
        spans: list[tuple[Unit, Floats]] = []
        for unit in batch.units:
            spans.append((unit, rows[first : first + len(unit.rows)]))
            first += len(unit.rows)
        by_stream: dict[str, list[tuple[Unit, Floats]]] = {}
        for unit, mine in spans:
            if unit.text is None and unit.error is None:
                by_stream.setdefault(unit.stream, []).append((unit, mine))
            else:
                stored = self._until_done(partial(self._commit_one, unit, mine))
                self.upkeep.delivered([unit], mine, batch.formed_at, computed_at, stored)
        for stream, some in by_stream.items():
            oldest = min(unit.taken_at for unit, _ in some)
            header = self._header(computed_at - oldest)
            entries = [
                (unit.entry[0], ",".join(one.to_json() for one in unit.embedded()), mine.tobytes())
                for unit, mine in some
                if unit.entry is not None
            ]
            stored = self._until_done(partial(self._server.commit, stream, header, entries))
            self.upkeep.delivered(
                [unit for unit, _ in some], some[0][1], batch.formed_at, computed_at, stored
            )

    def _commit_one(self, unit: Unit, rows: Floats) -> Stored:
        if unit.text is None:
            assert unit.entry is not None
            return self._server.commit(unit.stream, error_of(unit), [(unit.entry[0], "", b"")])
        response: list[Any] = []
        if unit.error is not None:
            response = [*error_of(unit)]
        elif unit.chunks:
            header = self._header(time.monotonic() - unit.taken_at)
            response = [*header, *chunk_fields(unit, rows)]
        return self._server.commit_text(
            unit.stream,
            unit.text,
            done_bytes=unit.done_bytes,
            progress=unit.progress,
            need=unit.need,
            how=unit.how,
            response=response,
        )

    def _header(self, latency_s: float) -> list[Any]:
        card = self._encoder.card
        return response_fields(
            space=card.space,
            model=card.model,
            device=self._device_id,
            width=card.width,
            latency_ms=1000 * latency_s,
        )

    def _until_done(self, write: Callable[[], Stored]) -> Stored | None:
        """Write, and again while the server is away; what was written already is not written twice."""
        while True:
            try:
                return write()
            except redis.RedisError as error:
                logger.warning("vectors of a stream are kept until they can be written: %s", error)
                if self._ended.wait(AGAIN_S):
                    return None

    def _give_back(self, units: Sequence[Unit]) -> None:
        for stream in {unit.stream for unit in units}:
            for deliveries in {unit.deliveries for unit in units}:
                mine = [u for u in units if u.stream == stream and u.deliveries == deliveries]
                entries = [unit.entry[0] for unit in mine if unit.entry is not None]
                texts = [unit.text for unit in mine if unit.text is not None]
                try:
                    self._server.give_back(stream, entries, texts, deliveries)
                except redis.RedisError as error:
                    logger.warning("what was not begun is claimed by others later: %s", error)

    def _finished(self, batch: _Batch) -> None:
        with self._changed:
            self._in_flight -= batch.size
            for unit in batch.units:
                self._held.pop(unit, None)
            self._changed.notify_all()
