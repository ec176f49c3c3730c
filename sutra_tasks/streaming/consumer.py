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
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
import redis

from sutra_tasks.batching.batcher import DeviceBroken, Drained, Encoded, TextError
from sutra_tasks.errors import EncodingError, PoisonMessageError
from sutra_tasks.streaming.batch_size import SizeOptimizer, should_trigger
from sutra_tasks.streaming.units import Cutter, Unit, chunk_fields, error_of, response_fields
from sutra_tasks.streaming.upkeep import Upkeep
from sutra_tasks.vectors import finish

if TYPE_CHECKING:
    from sutra_tasks.batching.batcher import Batch, Batcher
    from sutra_tasks.engines.encoder import Encoder
    from sutra_tasks.settings import Settings
    from sutra_tasks.streaming.store import OpenText, RawEntry, Server, Stored
    from sutra_tasks.vectors import Floats

__all__ = ["Seat", "StreamConsumer"]

logger = logging.getLogger(__name__)

AHEAD_BATCHES: Final = 2
"""What waits in the batcher, so that the engine never does; it may compute both at once."""
MOST_BATCHES: Final = 8
"""What waits, computes or is being committed."""
IDLE_S: Final = 0.2
"""Seconds after which texts and silent consumers are looked for, though no entry came."""
TEXTS_S: Final = 0.01
"""The same while a text is in hand: there may be more of it once it is committed."""
FULL_S: Final = 0.02
NAMES_S: Final = 0.5
AGAIN_S: Final = 0.5
BROKEN_S: Final = 2.0
"""Seconds after which it is known whether a device that failed its own check serves: until then it takes
nothing, or it would soon have failed on everything."""
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
    """Units whose rows are computed together, by the model that tokenised them."""

    def __init__(self, units: Sequence[Unit], formed_at: float, cutter: Cutter) -> None:
        self.units, self.formed_at, self.cutter = list(units), formed_at, cutter
        self.size = sum(max(1, len(unit.rows)) for unit in units)


class StreamConsumer:
    """The streams' part of a device worker."""

    def __init__(
        self,
        server: Server,
        model: Callable[[], Encoder],
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
            model: the engine that serves now; another one after a swap.
            batcher: that computes.
            options: of this deployment.
            device_id: of this device.
            seat: its ``join``, ``leave`` and ``alone`` share the device with tasks.
            serves: whether the device takes work.
            load: of this machine, 0 to 1.
        """
        self._server, self._model, self._batcher, self._options = server, model, batcher, options
        self._device_id, self._seat, self._serves = device_id, seat, serves
        self._encoder = model()
        self._cutter = Cutter(self._encoder, options)
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
        self._broken_until = self._looks_again_at = -float("inf")
        self._backlog = False
        self._texts_committed = 0
        self.upkeep = Upkeep(server, batcher, options, load)
        self._reader = threading.Thread(target=self._read_all, name="stream-reader", daemon=True)
        self._writer = threading.Thread(target=self._write_all, name="stream-writer", daemon=True)

    def start(self) -> None:
        """Begin to read."""
        self._reader.start()
        self._writer.start()

    def measured(self, batch: Batch) -> None:
        """Learn from a batch of the engine, whoever's texts it held; on the batcher's thread."""
        if not batch.errors and not batch.retried:
            self._sizes = self._sizes.measured(batch.texts, batch.compute_s, time.monotonic())
        with self._changed:
            self._changed.notify_all()

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
        self._return_forming()

    def _step(self) -> None:
        now = time.monotonic()
        if (encoder := self._model()) is not self._encoder:
            # What the other model has cut is computed by it.
            self._submit_formed(self._options.batch_texts, at_once=True)
            self._encoder, self._cutter = encoder, Cutter(encoder, self._options)
        if now - self._named_at >= NAMES_S:
            self._streams, self._named_at = self._server.streams(), now
        if not self._takes_work() or not self._streams:
            self._return_forming()
            self._stopping.wait(IDLE_S)
            return
        if now - self._claimed_at >= min(1.0, self._options.stream_claim_s / 2):
            self._claimed_at = now
            self._claim()
        size = self._sizes.size(now, backlog=self._backlog)
        texts_committed = self._texts_committed
        room = self._room(size)
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
        if not found:
            self._rest(room, behind, has_texts=self._texts_committed != texts_committed)

    def _rest(self, room: int, behind: Mapping[str, bytes], *, has_texts: bool) -> None:
        """Wait until there may be something to do."""
        if room <= 0 or self._in_flight:
            # The engine is busy: what comes meanwhile is read together, for each look takes its time.
            with self._changed:
                self._changed.wait(self._until_trigger(FULL_S))
        elif has_texts or self._has_texts():
            self._stopping.wait(self._until_trigger(TEXTS_S))
        elif self._forming or len(behind) < len(self._streams):
            # Not on the server, which looks at its clock ten times a second only.
            self._stopping.wait(self._until_trigger(FULL_S))
        else:
            self._server.await_entries(behind, IDLE_S)

    def _room(self, size: int) -> int:
        """Return how many entries to take now."""
        ahead = AHEAD_BATCHES * size - self._batcher.waiting_texts
        own = size - self._in_flight  # however many texts of tasks wait
        most = MOST_BATCHES * size - self._in_flight
        return min(most, max(ahead, own)) - len(self._forming)

    def _takes_work(self) -> bool:
        return not self._stopping.is_set() and time.monotonic() >= self._broken_until and self._serves()

    def _form(self, unit: Unit) -> None:
        """Have a unit wait for others; it is held from now on."""
        with self._changed:
            self._held[unit] = None
        self._forming.append(unit)

    def _has_texts(self) -> bool:
        with self._changed:
            return any(unit.text is not None for unit in self._held)

    def _return_forming(self) -> None:
        units = list(self._forming)
        self._forming.clear()
        self._give_back(units)
        self._let_go(units)

    def _let_go(self, units: Sequence[Unit]) -> None:
        with self._changed:
            for unit in units:
                self._held.pop(unit, None)

    def _take(self, stream: str, most: int) -> tuple[int, bytes | None]:
        read = self._server.read(
            stream,
            most,
            first_need=self._cutter.first_need,
            most_unread=self._options.stream_output_size,
        )
        now = time.monotonic()
        for raw in read.entries:
            self._form(self._cutter.of_entry(stream, raw, now))
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
                    self._form(self._cutter.of_text(stream, text, now))
            taken += len(texts)
        return taken, read.last

    def _until_trigger(self, most_s: float) -> float:
        if not self._forming:
            return most_s
        age_s = time.monotonic() - self._forming[0].taken_at
        return min(most_s, max(0.001, self._options.stream_max_latency_ms / 1000 - age_s))

    def _submit_formed(self, size: int, *, at_once: bool = False) -> None:
        while self._forming:
            age_ms = 1000 * (time.monotonic() - self._forming[0].taken_at)
            if not at_once and not should_trigger(
                len(self._forming),
                age_ms,
                batch_size=size,
                max_latency_ms=self._options.stream_max_latency_ms,
            ):
                return
            some = [self._forming.popleft() for _ in range(min(size, len(self._forming)))]
            self._submit(some, self._cutter)

    def _submit(self, units: Sequence[Unit], cutter: Cutter) -> None:
        batch = self._begin(units, cutter)
        rows = [row for unit in units for row in unit.rows]
        if not rows:
            self._done.put((batch, None))
            return
        self._seat.join()
        future = self._batcher.submit(rows, encoder=cutter.encoder)
        future.add_done_callback(lambda done: self._computed(batch, done))

    def _computed(self, batch: _Batch, future: Future[Encoded]) -> None:
        self._seat.leave()
        self._done.put((batch, future))

    def _begin(self, units: Sequence[Unit], cutter: Cutter) -> _Batch:
        now = time.monotonic()
        try:
            cutter.tokenize(units)
        except BaseException:
            self._let_go(units)  # others claim them, and run each alone
            raise
        batch = _Batch(units, now, cutter)
        with self._changed:
            self._in_flight += batch.size
            self._held.update(dict.fromkeys(units))
        return batch

    def _claim(self) -> None:
        """Take over from consumers that fell silent, one entry after the other."""
        for stream in self._streams:
            while self._takes_work():
                claimed = self._server.claim(stream, self._options.stream_claim_s)
                if not claimed.entries:
                    break
                self.upkeep.claimed(stream, len(claimed.entries))
                for raw in claimed.entries:
                    self._take_over(stream, raw, claimed.deliveries)

    def _take_over(self, stream: str, raw: RawEntry, deliveries: int) -> None:
        unit = self._cutter.of_entry(stream, raw, time.monotonic(), deliveries)
        if deliveries < SUSPECT_AFTER:
            self._form(unit)
        elif deliveries >= self._options.max_attempts:
            unit.error = PoisonMessageError(deliveries, "the workers that took this entry died")
            reason = ["reason", str(unit.error), "deliveries", deliveries]
            logger.error("stream %s, entry %s: %s", stream, unit.source, unit.error)
            self._server.give_up(stream, raw, reason, error_of(unit))
            self.upkeep.given_up(stream)
        else:
            self._run_alone(unit)

    def _suspect_text(self, stream: str, text: OpenText) -> Unit:
        now = time.monotonic()
        if text.attempts <= self._options.max_attempts:
            return self._cutter.of_text(stream, text, now)
        error = PoisonMessageError(text.attempts - 1, "the workers that took this text died")
        logger.error("stream %s: a stretch of a text was given up: %s", stream, error)
        letter = ["key", text.key, "source", text.source, "position", text.progress.position,
                  "text", text.buffer, "reason", str(error)]  # fmt: skip
        self._server.bury(stream, text, letter)
        return self._cutter.given_up(stream, text, now, error)

    def _run_alone(self, unit: Unit) -> None:
        """Compute it while nothing else is, so that there is no doubt if this process ends."""
        self._submit_formed(self._options.batch_texts, at_once=True)
        with self._changed:
            self._changed.wait_for(lambda: not self._in_flight or self._stopping.is_set())
        batch = self._begin([unit], self._cutter)
        if not unit.rows:
            self._done.put((batch, None))
            return
        future: Future[Encoded] | None = None
        try:
            with self._seat.alone():
                self._server.mark(unit.source)
                future = self._batcher.submit(unit.rows, encoder=self._encoder, alone=True)
                future.exception()
                self._server.unmark()
        finally:
            if future is not None:
                self._done.put((batch, future))
            else:  # the server is away: others claim it
                self._finished(batch)

    # The writer's thread.

    def _write_all(self) -> None:
        while not self._ended.is_set() or not self._done.empty():
            try:
                batch, future = self._done.get(timeout=self.upkeep.pause_s)
            except queue.Empty:
                pass
            else:
                self._settle(batch, future)
            self._look_after()
        self.upkeep.leave()

    def _look_after(self) -> None:
        now = time.monotonic()
        if now < self._looks_again_at:
            return
        with self._changed:
            held = list(self._held)
        try:
            self.upkeep.step(self._streams, held)
        except redis.RedisError as error:
            logger.warning("streams are not looked after for now: %s", error)
            self._looks_again_at = now + AGAIN_S  # what is computed is still committed
        except Exception:
            logger.exception("streams are not looked after for now")
            self._looks_again_at = now + AGAIN_S

    def _settle(self, batch: _Batch, future: Future[Encoded] | None) -> None:
        """Commit a batch, or see to it that somebody else can."""
        again = False
        try:
            rows, computed_at = _rows_of(future), time.monotonic()
            compute_s = 0.0 if future is None else future.result().compute_s
            self._commit(batch, rows, computed_at, compute_s)
        except TextError as error:
            again = self._without(batch, error)
        except Drained:
            self._give_back(batch.units)
        except DeviceBroken:
            self._broken_until = time.monotonic() + BROKEN_S
            self._give_back(batch.units, failed=True)
        except Exception:
            logger.exception("a stream's entries were left to be claimed")
        finally:
            self._finished(batch, again=again)

    def _without(self, batch: _Batch, error: TextError) -> bool:
        """Tell of the text at fault; the others are computed once more, if it says so."""
        position, at_fault = error.position, batch.units[0]
        for unit in batch.units:
            at_fault = unit
            if position < len(unit.rows):
                break
            position -= len(unit.rows)
        # The engine's words may hold the text: only their kind is passed on.
        reason = EncodingError(self._device_id, 0, type(error.cause).__name__)
        at_fault.error, at_fault.rows = reason, []
        try:
            self._submit(batch.units, batch.cutter)
        except Exception:
            logger.exception("a stream's entries were left to be claimed")
            return False
        return True

    def _commit(self, batch: _Batch, rows: Floats, computed_at: float, compute_s: float) -> None:
        first, encoder = 0, batch.cutter.encoder
        told = partial(
            self.upkeep.delivered, formed_at=batch.formed_at, compute_s=compute_s, encoder=encoder
        )
        spans: list[tuple[Unit, Floats]] = []
        for unit in batch.units:
            spans.append((unit, rows[first : first + len(unit.rows)]))
            first += len(unit.rows)
        by_stream: dict[str, list[tuple[Unit, Floats]]] = {}
        for unit, mine in spans:
            if unit.text is None and unit.error is None:
                by_stream.setdefault(unit.stream, []).append((unit, mine))
            else:
                stored = self._until_done(partial(self._commit_one, encoder, unit, mine))
                self._texts_committed += unit.text is not None
                told([unit], mine, stored=stored)
        for stream, some in by_stream.items():
            oldest = min(unit.taken_at for unit, _ in some)
            header = self._header(encoder, computed_at - oldest)
            entries = [
                (unit.entry[0], ",".join(one.to_json() for one in unit.embedded()), mine.tobytes())
                for unit, mine in some
                if unit.entry is not None
            ]
            stored = self._until_done(partial(self._server.commit, stream, header, entries))
            told([unit for unit, _ in some], some[0][1], stored=stored)

    def _commit_one(self, encoder: Encoder, unit: Unit, rows: Floats) -> Stored:
        if unit.text is None:
            assert unit.entry is not None
            return self._server.commit(unit.stream, error_of(unit), [(unit.entry[0], "", b"")])
        response: list[Any] = []
        if unit.error is not None:
            response = [*error_of(unit)]
        elif unit.chunks:
            header = self._header(encoder, time.monotonic() - unit.taken_at)
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

    def _header(self, encoder: Encoder, latency_s: float) -> list[Any]:
        info = encoder.info
        return response_fields(
            space=info.space,
            model=info.model,
            device=self._device_id,
            width=info.width,
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

    def _give_back(self, units: Sequence[Unit], *, failed: bool = False) -> None:
        """Let others have units; that this device ``failed`` on them counts against them."""
        for stream in {unit.stream for unit in units}:
            for deliveries in {unit.deliveries for unit in units}:
                mine = [u for u in units if u.stream == stream and u.deliveries == deliveries]
                entries = [unit.entry[0] for unit in mine if unit.entry is not None]
                texts = [unit.text for unit in mine if unit.text is not None]
                try:
                    if failed:  # a text counts as taken already
                        self._server.refresh(stream, [], texts, 0)
                        texts = []
                    self._server.give_back(stream, entries, texts, deliveries + failed)
                except redis.RedisError as error:
                    logger.warning("what was not begun is claimed by others later: %s", error)

    def _finished(self, batch: _Batch, *, again: bool = False) -> None:
        """Count a batch no more; its units are still held if they are computed ``again``."""
        if not again:
            self._let_go(batch.units)
        with self._changed:
            self._in_flight -= batch.size
            self._changed.notify_all()


def _rows_of(future: Future[Encoded] | None) -> Floats:
    if future is None:
        return np.empty((0, 0), dtype=np.float32)
    return finish(future.result().rows, dimensions=None, normalize=True).astype("<f4", copy=False)
