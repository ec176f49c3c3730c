"""A device's part in streams, where the engine, the tokenizer or the server fails."""

import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest

from sutra_tasks.batching.shared_lock import SharedLock
from sutra_tasks.engines.encoder import TokenizedText
from sutra_tasks.engines.simulated_engine import SimulatedEncoder
from sutra_tasks.streaming.chunker import TextProgress
from sutra_tasks.streaming.consumer import commit, faults, pacing
from sutra_tasks.streaming.delivered import ClaimedEntries, OpenText
from sutra_tasks.vectors import Floats
from tests.conftest import wait_until
from tests.unit.fake_streams import AWAY, REFUSED, FakeStore, consuming, entry, new_batcher


class Picky(SimulatedEncoder):
    """Raises on a text that says so, where it says so; a closed gate holds it up."""

    def __init__(self) -> None:
        super().__init__(width=4)
        self.gate = threading.Event()
        self.gate.set()

    def tokenize(self, texts: Sequence[str], prompt: str | None) -> list[TokenizedText]:
        if any("no tokens" in text for text in texts):
            raise ValueError("the tokenizer failed")
        return super().tokenize(texts, prompt)

    def encode(self, batch: Sequence[TokenizedText]) -> Floats:
        assert self.gate.wait(10)
        if any("none after it" in text.content for text in batch) and len(batch) == 1:
            self.gate.clear()
        if any("no vector" in text.content for text in batch):
            raise ValueError("the engine failed")
        return super().encode(batch)


@pytest.fixture(autouse=True)
def _brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pacing, "SERVER_RETRY_S", 0.02)
    monkeypatch.setattr(pacing, "IDLE_S", 0.02)
    monkeypatch.setattr(faults, "FIRST_PAUSE_S", 0.1)


def open_text(words: str, *, attempts: int = 1) -> OpenText:
    return OpenText(b"k", b"1", attempts, "end", words.encode(), "id", None, TextProgress(), 0)


def committed(store: FakeStore, **expected: str) -> None:
    """Await what becomes of entries."""
    wanted = {name.removeprefix("_") + "-0": kind for name, kind in expected.items()}
    wait_until(lambda: store.committed.items() >= wanted.items())


def test_every_entry_of_a_batch_is_committed_but_the_one_the_engine_fails_on() -> None:
    store = FakeStore()
    store.waiting.extend([entry(1), entry(2, "no vector"), entry(3)])
    with consuming(store, Picky()):
        committed(store, _1="response", _2="EncodingError", _3="response")


@pytest.mark.parametrize("call", ["mark_suspect", "unmark_suspect"])
def test_a_suspect_is_left_to_be_claimed_if_the_server_is_away(call: str) -> None:
    store = FakeStore()
    store.failures[call].append(AWAY)
    store.claims.append(ClaimedEntries(1, [entry(1)]))
    with consuming(store) as one:
        wait_until(lambda: store.done[call])
        store.waiting.append(entry(2))
        committed(store, _2="response")
        if call == "unmark_suspect":  # it was computed
            committed(store, _1="response")
        wait_until(lambda: not one._shared.taken() and not one._shared.rows_in_flight)


def test_entries_that_wait_on_the_device_are_refreshed() -> None:
    store, lock = FakeStore(), SharedLock()
    with consuming(store, lock=lock, stream_batch_size=4), lock.exclusive():
        store.waiting.extend(entry(n) for n in range(1, 5))
        wait_until(lambda: all(store.refreshed[f"{n}-0".encode()] > 1 for n in range(1, 5)))
        assert not store.committed


def test_a_suspect_is_computed_alone_and_marked_meanwhile() -> None:
    store, lock, seen = FakeStore(), SharedLock(), dict[str, tuple[bool, str | None]]()

    class Watching(Picky):
        def tokenize(self, texts: Sequence[str], prompt: str | None) -> list[TokenizedText]:
            if any("suspect" in text for text in texts):
                seen.setdefault(f"tokens of {texts[0][:12]}", (lock._taken, store.marked))
            return super().tokenize(texts, prompt)

        def encode(self, batch: Sequence[TokenizedText]) -> Floats:
            if any("suspect" in text.content for text in batch):
                assert len(batch) == 1
                seen.setdefault(batch[0].content, (lock._taken, store.marked))
            return super().encode(batch)

    store.waiting.extend(entry(n) for n in range(1, 5))
    store.claims.append(ClaimedEntries(1, [entry(5, "suspect", id="mine")]))
    store.texts.append(open_text("suspect text", attempts=2))
    with consuming(store, Watching(), lock=lock):
        committed(store, _5="response")
        wait_until(lambda: store.committed.get("k") == "response")
        entry_seen = dict.fromkeys(("tokens of suspect", "suspect"), (True, "mine"))
        text_seen = dict.fromkeys(("tokens of suspect text", "suspect text"), (True, "id"))
        assert seen == entry_seen | text_seen
        wait_until(lambda: store.marked is None)


def test_entries_that_are_computed_once_more_are_refreshed() -> None:
    store, encoder = FakeStore(), Picky()
    store.waiting.extend([entry(1), entry(2, "no vector, and none after it")])
    with consuming(store, encoder):
        wait_until(lambda: not encoder.gate.is_set())
        before = store.refreshed[b"1-0"]
        wait_until(lambda: store.refreshed[b"1-0"] > before + 1)
        encoder.gate.set()
        committed(store, _1="response", _2="EncodingError")


def test_an_entry_the_tokenizer_fails_on_is_left_to_be_claimed_and_its_batch_is_committed() -> None:
    store = FakeStore()
    store.waiting.extend([entry(1), entry(2, "no tokens"), entry(3)])
    with consuming(store, Picky(), stream_max_latency_ms=0) as one:
        wait_until(lambda: not store.waiting and not one._shared.taken())
        committed(store, _1="response", _3="response")
        store.claims.append(ClaimedEntries(1, [entry(2, "no tokens")]))
        store.claims.append(ClaimedEntries(3, [entry(2, "no tokens")]))
        committed(store, _2="dead letter")


def test_a_text_that_can_never_be_tokenised_becomes_a_dead_letter() -> None:
    store = FakeStore()
    store.texts.extend(open_text("no tokens here", attempts=n) for n in (1, 2, 3, 4))
    with consuming(store, Picky()):
        wait_until(lambda: store.committed.get("k") == "PoisonMessageError")
    (letter,) = store.letters
    assert b"no tokens here" in letter


def test_a_broken_device_requeues_what_it_had_and_takes_nothing_for_a_while() -> None:
    store = FakeStore()
    store.waiting.extend([entry(1), entry(2, "no vector")])
    with consuming(store, Picky(), batcher=new_batcher(self_check=lambda: False)):
        wait_until(lambda: store.requeued)
        store.waiting.append(entry(3))
        store.claims.append(ClaimedEntries(0, [entry(1)]))
        reads = store.done["read"]
        with pytest.raises(AssertionError):
            wait_until(lambda: store.done["read"] > reads + 1, within_s=0.5)
    assert store.requeued == {b"1-0": 1, b"2-0": 1}  # it may be at fault: it counts
    assert not store.committed


def test_a_worker_that_stops_requeues_what_has_not_begun_uncounted() -> None:
    store, encoder, batcher = FakeStore(), Picky(), new_batcher()
    encoder.gate.clear()
    store.waiting.extend(entry(n) for n in range(1, 4))
    store.waiting.append(entry(4, prompt="unknown"))
    options: dict[str, Any] = {"stream_max_latency_ms": 100, "stream_batch_size": 3}
    with consuming(store, encoder, batcher=batcher, **options) as one:
        wait_until(lambda: batcher.waiting_texts == 0 and one._shared.rows_in_flight)
        store.waiting.extend(entry(n) for n in range(5, 8))
        wait_until(lambda: batcher.waiting_texts)
        one.drain(10)
        batcher.drain()
        encoder.gate.set()
        committed(store, _1="response", _2="response", _3="response")
    assert store.requeued.keys() >= {b"5-0", b"6-0", b"7-0"}
    assert set(store.requeued.values()) == {0}
    assert store.requeued.keys() | {one.encode() for one in store.committed} == {
        f"{n}-0".encode() for n in range(1, 8)
    }


def test_an_unforeseen_error_of_a_commit_ends_no_thread() -> None:
    store = FakeStore()
    store.failures["commit"].append(ValueError("unforeseen"))
    store.waiting.append(entry(1))
    with consuming(store) as one:
        wait_until(lambda: store.done["commit"] and not one._shared.taken())
        store.waiting.append(entry(2))
        committed(store, _2="response")


def test_vectors_that_the_server_refuses_become_a_dead_letter_and_their_reader_is_told() -> None:
    store = FakeStore()
    store.too_large = {"2-0"}
    store.waiting.extend([entry(1), entry(2), entry(3)])
    with consuming(store):
        committed(store, _1="response", _2="dead letter", _3="response")
    assert store.told["error"] == "StreamFaultError"
    assert "too large to be stored" in store.told["message"]
    (letter,) = store.letters
    assert b"text 2" in letter


def test_a_stretch_of_a_text_that_the_server_refuses_becomes_a_dead_letter() -> None:
    store = FakeStore()
    store.too_large = {"k"}
    store.texts.append(open_text("some words"))
    with consuming(store):
        wait_until(lambda: store.committed.get("k") == "StreamFaultError")
    (letter,) = store.letters
    assert b"some words" in letter


def test_a_response_over_which_the_server_closes_the_connection_is_refused_if_it_is_large(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(commit, "LARGE_BYTES", 4 * 4)
    store = FakeStore()
    store.failures["commit"].extend([AWAY] * (commit.LARGE_FAILURES + 1))
    store.failures["answers"].append(AWAY)  # it was away as well at first
    store.waiting.append(entry(1))
    with consuming(store):
        committed(store, _1="dead letter")
    assert "16 bytes" in store.told["message"]
    assert store.done["commit"] == commit.LARGE_FAILURES + 1


def test_what_is_refused_as_an_error_as_well_is_requeued_uncounted_and_left_alone_for_a_while() -> None:
    store = FakeStore()
    store.failures["commit"].extend([REFUSED] * 2)
    store.failures["dead_letter"].append(REFUSED)
    store.waiting.extend([entry(1), entry(2)])
    with consuming(store, stream_batch_size=2, stream_max_latency_ms=100) as one:
        wait_until(lambda: store.requeued.keys() == {b"1-0", b"2-0"})
        (reason,) = one._shared.faults.reasons(time.monotonic())["s"]
        assert reason == "commit: WRONGTYPE"
        store.claims.append(ClaimedEntries(0, [entry(1), entry(2)]))
        committed(store, _1="response", _2="response")
        wait_until(lambda: not one._shared.faults.reasons(time.monotonic()))
    assert set(store.requeued.values()) == {0}
    assert store.done["dead_letter"] == 1


def test_vectors_are_kept_while_the_server_is_away() -> None:
    store = FakeStore()
    store.failures["commit"].extend([AWAY, AWAY])
    store.waiting.append(entry(1))
    with consuming(store):
        committed(store, _1="response")
    assert store.done["commit"] == 3


def test_commits_do_not_wait_for_upkeep_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pacing, "SERVER_RETRY_S", 60)
    store = FakeStore()
    store.failures["report_load"].append(AWAY)
    with consuming(store):
        wait_until(lambda: store.done["report_load"])
        for number in (1, 2):
            store.waiting.append(entry(number))
            committed(store, **{f"_{number}": "response"})
    assert store.done["report_load"] == 1
