"""A stream's reader for benchmarks: it counts chunks, and compares chunks that arrive twice."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import redis

from sutra_tasks import EmbeddedChunk, StreamingError, StreamReader

if TYPE_CHECKING:
    from sutra_tasks.settings import Settings
    from sutra_tasks.vectors import Floats

    Check = Callable[[EmbeddedChunk, Floats], bool]


class Sink(threading.Thread):
    """Reads one stream until it is closed.

    Attributes:
        rows: bytes of each chunk's vector, by the chunk's id.
        chunks: each chunk, by its id.
        latencies_ms: from an entry's arrival to its response, by the server's clock.
        first_ms: when the first entry arrived.
        last_ms: when the last response was written.
        repeats: chunks that arrived again, with the same vector.
        wrong: chunks that arrived again with another vector, or that the check refused.
        errors: ids that had an error.
    """

    def __init__(self, stream: str, options: Settings, check: Check = lambda _, __: True) -> None:
        super().__init__(name=f"sink-{stream}", daemon=True)
        self.rows: dict[str, bytes] = {}
        self.chunks: dict[str, EmbeddedChunk] = {}
        self.latencies_ms: list[int] = []
        self.first_ms, self.last_ms = 2**63, 0
        self.repeats = self.wrong = 0
        self.errors: list[str] = []
        self._stream, self._options, self._check = stream, options, check
        self._closed = threading.Event()
        self._reads = threading.Event()
        self._reads.set()

    def run(self) -> None:
        """Read until closed; ``remember=0`` keeps repeats, which are compared."""
        with StreamReader(
            self._stream, timeout_s=0.5, remember=0, claim_s=5.0, options=self._options
        ) as reader:
            while not self._closed.is_set():
                self._reads.wait()
                try:
                    self._read(reader)
                except (redis.ConnectionError, redis.TimeoutError):
                    time.sleep(0.2)  # faults take the server away

    def _read(self, reader: StreamReader) -> None:
        for found in reader:
            if isinstance(found, StreamingError):
                self.errors += found.chunk_ids
                continue
            written_ms = int(found.entry_id.partition("-")[0])
            self.last_ms = max(self.last_ms, written_ms)
            for chunk, row in zip(found.chunks, found.embeddings, strict=True):
                self.first_ms = min(self.first_ms, chunk.arrived_ms)
                self.latencies_ms.append(written_ms - chunk.arrived_ms)
                self._take(chunk, row)
            if self._closed.is_set() or not self._reads.is_set():
                break
        reader.acknowledge()

    def pause(self, seconds: float) -> None:
        """Read nothing for ``seconds``."""
        self._reads.clear()
        time.sleep(seconds)
        self._reads.set()

    def close(self) -> None:
        """Stop reading, and wait until the thread has ended."""
        self._closed.set()
        self.join()

    @property
    def per_s(self) -> float:
        """Chunks a second, over the time from the first entry's arrival to the last response."""
        return 1000 * len(self.rows) / max(1, self.last_ms - self.first_ms)

    def _take(self, chunk: EmbeddedChunk, row: Floats) -> None:
        data = row.tobytes()
        before = self.rows.setdefault(chunk.id, data)
        if before is not data:
            self.repeats += before == data
            self.wrong += before != data
        elif len(self.rows) % 16 == 1:  # checking every chunk would be most of the work
            self.wrong += not self._check(chunk, row)
        self.chunks[chunk.id] = chunk
