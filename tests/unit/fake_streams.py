"""A store of streams in memory, whose failures are chosen, and consumers that run on it."""

import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import redis

from sutra_tasks.batching.batcher import Batcher
from sutra_tasks.batching.next_batch import Limits
from sutra_tasks.batching.shared_lock import SharedLock
from sutra_tasks.engines.simulated_engine import SimulatedEncoder
from sutra_tasks.settings import Settings
from sutra_tasks.streaming.backpressure import Level
from sutra_tasks.streaming.consumer.consumer import StreamConsumer
from sutra_tasks.streaming.delivered import (
    ClaimedEntries,
    CommitResult,
    OpenText,
    RawEntry,
    ReadEntries,
    TakenTexts,
)
from sutra_tasks.streaming.upkeep_store import StreamState

WITHIN_S = 10
AWAY = redis.ConnectionError("the server is away")
REFUSED = redis.ResponseError("WRONGTYPE")


def entry(number: int, text: str = "", **fields: str) -> RawEntry:
    found = {"text": text or f"text {number}", **fields}
    return f"{number}-0".encode(), [one.encode() for pair in found.items() for one in pair]


class FakeStore:
    """Both stores of one stream ``s``; what is claimed or taken is put there by the test."""

    def __init__(self) -> None:
        self.waiting: deque[RawEntry] = deque()
        self.claims: deque[ClaimedEntries] = deque()
        self.texts: deque[OpenText] = deque()
        self.state = StreamState(0, closed=False, unread=0, level=Level.NORMAL, loads={"me": 0.0})
        self.marked: str | None = None
        self.sizes: dict[str, int] = {}
        self.failures: defaultdict[str, deque[Exception]] = defaultdict(deque)
        self.too_large: set[str] = set()
        """Entries and texts whose vectors the server refuses; it takes an error instead."""
        self.letters: list[Sequence[Any]] = []
        self.told: dict[str, str] = {}
        self.committed: dict[str, str] = {}
        """What became of each entry or text: ``response``, or the name of an error."""
        self.requeued: dict[bytes, int] = {}
        self.refreshed: Counter[bytes] = Counter()
        self.published: list[dict[str, Any]] = []
        self.reports: list[Mapping[str, Any]] = []
        self.done: Counter[str] = Counter()

    def _does(self, what: str) -> None:
        self.done[what] += 1
        if self.failures[what]:
            raise self.failures[what].popleft()

    def streams(self) -> list[str]:
        return ["s"]

    def read(self, _: str, most: int, **__: Any) -> ReadEntries:
        self._does("read")
        some = [self.waiting.popleft() for _ in range(min(most, len(self.waiting)))]
        return ReadEntries(some, len(self.texts), None if some else b"0-0")

    def await_entries(self, *_: Any) -> bool:
        return not threading.Event().wait(0.001)

    def take_texts(self, *_: Any, **__: Any) -> TakenTexts:
        return TakenTexts([self.texts.popleft()] if self.texts else [], {})

    def claim(self, *_: Any) -> ClaimedEntries:
        return self.claims.popleft() if self.claims else ClaimedEntries(0, [])

    def commit(self, _: str, response: Sequence[Any], entries: Sequence[Any]) -> CommitResult:
        self._does("commit")
        self._refuse_large(response, {entry_id.decode() for entry_id, _, _ in entries})
        for entry_id, _chunks, _rows in entries:
            self.committed[entry_id.decode()] = _kind(response)
        return CommitResult(0.0, len(entries))

    def commit_text(
        self, _: str, text: OpenText, *, response: Sequence[Any], letter: Sequence[Any], **__: Any
    ) -> CommitResult:
        self._does("commit")
        self._refuse_large(response, {text.key.decode()})
        self.committed[text.key.decode()] = _kind(response)
        self.letters += [letter] if letter else []
        return CommitResult(0.0, 1)

    def _refuse_large(self, response: Sequence[Any], names: set[str]) -> None:
        if _kind(response) == "response" and names & self.too_large:
            raise redis.ResponseError("Elements are too large to be stored")

    def refresh(self, _: str, entries: Sequence[bytes], texts: Sequence[OpenText], __: float) -> None:
        self.refreshed.update(entries)
        self.refreshed.update(text.key for text in texts)

    def requeue(self, _: str, entries: Sequence[bytes], __: Any, deliveries: int) -> None:
        self.requeued.update(dict.fromkeys(entries, deliveries))

    def dead_letter(self, _: str, one: RawEntry, reason: Sequence[Any], error: Sequence[Any]) -> None:
        self._does("dead_letter")
        self.committed[one[0].decode()] = "dead letter"
        self.letters.append([*one[1], *reason])
        self.told = dict(zip(error[::2], error[1::2], strict=True))

    def answers(self) -> bool:
        try:
            self._does("answers")
        except redis.RedisError:
            return False
        return True

    def mark_suspect(self, name: str) -> None:
        self._does("mark_suspect")
        self.marked = name

    def unmark_suspect(self) -> None:
        self._does("unmark_suspect")
        self.marked = None

    def lease(self, name: str, _: float) -> StreamState:
        return replace(self.state, size=self.sizes.get(name, self.state.size))

    def report_load(self, _: float) -> None:
        self._does("report_load")

    def publish_backpressure(self, _: str, level: Level, before: Level, **said: Any) -> None:
        self.published.append({"level": level, "before": before, **said})
        self.state = replace(self.state, level=level)

    def enforce_hard_limit(self, *_: Any) -> None:
        self._does("enforce_hard_limit")

    def flush_texts(self, *_: Any) -> None:
        self._does("flush_texts")

    def remove_silent_consumers(self, *_: Any) -> None:
        self._does("remove_silent_consumers")

    def report_metrics(self, measured: Mapping[str, Any]) -> None:
        self.reports.append(measured)

    def remove_reports(self) -> None:
        self._does("remove_reports")


def _kind(response: Sequence[Any]) -> str:
    said = dict(zip(response[::2], response[1::2], strict=True))
    return str(said["error"] if said["kind"] == "error" else said["kind"])


def new_batcher(self_check: Callable[[], bool] | None = None) -> Batcher:
    return Batcher(Limits(8192, 128, 0), self_check=self_check)


@contextmanager
def consuming(
    store: Any,
    encoder: SimulatedEncoder | None = None,
    *,
    batcher: Batcher | None = None,
    lock: SharedLock | None = None,
    **options: Any,
) -> Iterator[StreamConsumer]:
    """Run a consumer on what is both stores, and see its threads end."""
    encoder = encoder or SimulatedEncoder(width=4)
    batcher = batcher or new_batcher()
    batcher.start()
    consumer = StreamConsumer(
        store,
        store,
        lambda: encoder,
        batcher,
        options=replace(Settings(stream_claim_s=0.5), **options),
        device_id="d",
        lock=lock or SharedLock(),
        serves=lambda: True,
        load=lambda: 0.0,
    )
    consumer.start()
    try:
        yield consumer
    finally:
        consumer.drain(WITHIN_S)
        batcher.drain()
        consumer.stop(WITHIN_S)
        batcher.close(WITHIN_S)
        assert not consumer._reader.is_alive()
        assert not consumer._writer.is_alive()
