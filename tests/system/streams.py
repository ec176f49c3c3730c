"""A stream as a test sees it: what was added to it, and all that came out."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import redis

from sutra_tasks import keys
from sutra_tasks.engines.simulated_engine import SimulatedEncoder, vectors_of
from sutra_tasks.streaming.chunker import Chunk, OverlapChunker, TextProgress
from sutra_tasks.streaming.responses import EmbeddedChunk, StreamingError, parse_output
from tests.conftest import wait_until
from tests.system.work import LEAST_COSINE, WIDTH

STREAMED: dict[str, Any] = {"stream_claim_s": 0.5, "stream_output_size": 1_000_000}
"""A consumer's silence is noticed soon, and nobody needs to read meanwhile."""

WITHIN_S = 20


@dataclass
class Stream:
    """One stream; ``sent`` are its whole texts by their ids."""

    client: redis.Redis
    name: str = "s"
    sent: dict[str, str] = field(default_factory=dict)
    written: list[tuple[EmbeddedChunk, bytes]] = field(default_factory=list)
    """All chunks with their vectors, in the order of the output, repeats included."""
    errors: dict[str, StreamingError] = field(default_factory=dict)
    devices: dict[str, str] = field(default_factory=dict)
    """Who computed each chunk first."""
    _last: str = "0"

    def key(self, part: str) -> str:
        return keys.stream(self.name, part)

    def xadd(self, *entries: Mapping[str, str | bytes]) -> None:
        """Add as any producer can."""
        with self.client.pipeline(transaction=False) as pipe:
            pipe.sadd(keys.streams(), self.name)
            for fields in entries:
                pipe.xadd(self.key("in"), dict[Any, Any](fields))
            pipe.execute()

    def add(self, texts: Iterable[str]) -> None:
        """Add whole texts, with ids of their own."""
        found = {f"{self.name}-{len(self.sent) + n}": text for n, text in enumerate(texts)}
        self.sent.update(found)
        self.xadd(*({"id": name, "text": text} for name, text in found.items()))

    def write(self, key: str, *pieces: bytes, end: bool = True) -> None:
        """Add a text in pieces, the first of which names it."""
        fields: list[dict[str, str | bytes]] = [{"key": key, "text": piece} for piece in pieces]
        if end:
            fields[-1]["end"] = "1"
        self.xadd(*fields)

    def size(self, part: str = "in") -> int:
        found: Any = self.client.xlen(self.key(part))
        return int(found)

    def pending(self, consumer: str | None = None) -> list[dict[str, Any]]:
        """Return what was read and is not committed, by one consumer or by all."""
        try:
            found: Any = self.client.xpending_range(
                self.key("in"), keys.DEVICES_GROUP, "-", "+", 10_000, consumer
            )
        except redis.ResponseError:  # nobody has read yet
            return []
        return list(found)

    def look(self) -> None:
        """Read what came out since the last look, and leave it there."""
        found: Any = self.client.xrange(self.key("out"), f"({self._last}")
        for entry_id, fields in found:
            self._last = entry_id.decode()
            said = parse_output(entry_id, fields)
            if isinstance(said, StreamingError):
                self.errors.update(dict.fromkeys(said.chunk_ids, said))
                continue
            assert said.embeddings.shape == (len(said.chunks), WIDTH)
            rows = [row.tobytes() for row in said.embeddings]
            self.devices = dict.fromkeys(said.chunk_ids, said.device) | self.devices
            self.written += zip(said.chunks, rows, strict=True)

    def by_id(self) -> dict[str, tuple[EmbeddedChunk, bytes]]:
        """Return each chunk once; what is there twice must be the same."""
        found: dict[str, tuple[EmbeddedChunk, bytes]] = {}
        for chunk, row in self.written:
            assert found.setdefault(chunk.id, (chunk, row))[1] == row
        return found

    def repeats(self) -> int:
        return len(self.written) - len({chunk.id for chunk, _ in self.written})

    def of_text(self, key: str) -> list[EmbeddedChunk]:
        """Return the chunks of a text that was written in pieces, in the order of the output."""
        return [chunk for chunk, _ in self.written if chunk.key == key]

    def await_that(self, condition: Callable[[], object]) -> None:
        """Return once something is true of the output."""

        def met() -> bool:
            self.look()
            return bool(condition())

        wait_until(met, within_s=WITHIN_S)

    def check(self, *, wrong: Iterable[str] = ()) -> None:
        """See every whole text come back with its vector, but for those with an error."""
        failing = set(wrong)
        self.await_that(
            lambda: (
                {c.id for c, _ in self.written} >= self.sent.keys() - failing
                and self.errors.keys() >= failing
            )
        )
        assert self.errors.keys() == failing
        found = self.by_id()
        names = [name for name in self.sent if name not in failing]
        self.check_vectors([self.sent[name] for name in names], [found[name][1] for name in names])

    @staticmethod
    def check_vectors(texts: list[str], rows: list[bytes]) -> None:
        got = np.frombuffer(b"".join(rows), dtype="<f4").reshape(len(texts), WIDTH)
        cosines = np.sum(got * vectors_of(texts, WIDTH), axis=1, dtype=np.float64)
        assert np.min(cosines, initial=1.0) >= LEAST_COSINE

    def check_text(self, key: str, text: str, expected: Iterable[Chunk]) -> None:
        """See a text come back in just those chunks, in order, with their vectors."""
        chunks = list(expected)
        self.await_that(lambda: len(self.of_text(key)) >= len(chunks))
        got = self.of_text(key)
        assert [(c.number, c.start, c.end, c.overlap_previous, c.overlap_next) for c in got] == [
            (c.number, c.start, c.end, c.overlap_previous, c.overlap_next) for c in chunks
        ]
        rows = [row for chunk, row in self.written if chunk.key == key]
        self.check_vectors([text[c.start : c.end] for c in got], rows)


def chunks_of(text: str, *, block: int = 512, overlap: int = 50) -> list[Chunk]:
    """Return the chunks of a text that comes at once, by the law that pieces must follow."""
    encoder = SimulatedEncoder()
    special = encoder.tokenize([""], None)[0].tokens
    chunker = OverlapChunker(
        block - special, overlap, lambda one: encoder.offsets(encoder.tokenize([one], None)[0])
    )
    return chunker.chunks(text, TextProgress(), "end")[0]
