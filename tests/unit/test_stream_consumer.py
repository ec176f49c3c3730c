"""A device's part in streams, where the engine, the tokenizer or the server fails."""

import threading
from collections.abc import Sequence

import pytest

from sutra_tasks.batching.shared_lock import Floor
from sutra_tasks.engines.encoder import TokenizedText
from sutra_tasks.engines.simulated_engine import SimulatedEncoder
from sutra_tasks.streaming import consumer
from sutra_tasks.streaming.chunker import Progress
from sutra_tasks.streaming.store import Claimed, OpenText
from sutra_tasks.vectors import Floats
from tests.conftest import wait_until
from tests.unit.fake_streams import AWAY, FakeServer, consuming, entry


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
    monkeypatch.setattr(consumer, "AGAIN_S", 0.02)
    monkeypatch.setattr(consumer, "IDLE_S", 0.02)


def open_text(words: str, *, attempts: int = 1) -> OpenText:
    return OpenText(b"k", b"1", attempts, "end", words.encode(), "id", None, Progress(), 0)


def committed(server: FakeServer, **expected: str) -> None:
    """Await what becomes of entries."""
    wanted = {name.removeprefix("_") + "-0": kind for name, kind in expected.items()}
    wait_until(lambda: server.committed.items() >= wanted.items())


def test_every_entry_of_a_batch_is_committed_but_the_one_the_engine_fails_on() -> None:
    server = FakeServer()
    server.waiting.extend([entry(1), entry(2, "no vector"), entry(3)])
    with consuming(server, Picky()):
        committed(server, _1="response", _2="EncodingError", _3="response")


@pytest.mark.parametrize("call", ["mark", "unmark"])
def test_a_suspect_is_not_held_for_good_where_the_server_was_away(call: str) -> None:
    server = FakeServer()
    server.failures[call].append(AWAY)
    server.claims.append(Claimed(1, [entry(1)]))
    with consuming(server) as one:
        wait_until(lambda: server.done[call])
        server.waiting.append(entry(2))
        committed(server, _2="response")
        if call == "unmark":  # it was computed
            committed(server, _1="response")
        wait_until(lambda: not one._held and not one._in_flight)


def test_entries_that_wait_on_the_device_are_kept_from_others() -> None:
    server, floor = FakeServer(), Floor()
    with consuming(server, floor=floor, stream_batch_size=4), floor.alone():
        server.waiting.extend(entry(n) for n in range(1, 5))
        wait_until(lambda: all(server.refreshed[f"{n}-0".encode()] > 1 for n in range(1, 5)))
        assert not server.committed


def test_a_suspect_is_computed_alone_and_named_meanwhile() -> None:
    server, floor, seen = FakeServer(), Floor(), dict[str, tuple[bool, str | None]]()

    class Watching(Picky):
        def encode(self, batch: Sequence[TokenizedText]) -> Floats:
            if any("suspect" in text.content for text in batch):
                assert len(batch) == 1
                seen.setdefault(batch[0].content, (floor._taken, server.marked))
            return super().encode(batch)

    server.waiting.extend(entry(n) for n in range(1, 5))
    server.claims.append(Claimed(1, [entry(5, "suspect", id="mine")]))
    server.texts.append(open_text("suspect text", attempts=2))
    with consuming(server, Watching(), floor=floor):
        committed(server, _5="response")
        wait_until(lambda: server.committed.get("k") == "response")
        assert seen == {"suspect": (True, "mine"), "suspect text": (True, "id")}
        wait_until(lambda: server.marked is None)


def test_entries_that_are_computed_once_more_are_kept_from_others() -> None:
    server, encoder = FakeServer(), Picky()
    server.waiting.extend([entry(1), entry(2, "no vector, and none after it")])
    with consuming(server, encoder):
        wait_until(lambda: not encoder.gate.is_set())
        before = server.refreshed[b"1-0"]
        wait_until(lambda: server.refreshed[b"1-0"] > before + 1)
        encoder.gate.set()
        committed(server, _1="response", _2="EncodingError")


def test_a_batch_the_tokenizer_fails_on_is_left_to_be_claimed_entry_by_entry() -> None:
    server = FakeServer()
    server.waiting.extend([entry(1), entry(2, "no tokens")])
    with consuming(server, Picky(), stream_max_latency_ms=0) as one:
        wait_until(lambda: not server.waiting and not one._held)
        server.claims.extend([Claimed(1, [entry(1)]), Claimed(1, [entry(2, "no tokens")])])
        server.claims.append(Claimed(3, [entry(2, "no tokens")]))
        committed(server, _1="response", _2="given up")


def test_a_text_that_can_never_be_cut_becomes_a_dead_letter() -> None:
    server = FakeServer()
    server.texts.extend(open_text("no tokens here", attempts=n) for n in (1, 2, 3, 4))
    with consuming(server, Picky()):
        wait_until(lambda: server.committed.get("k") == "PoisonMessageError")
    assert server.done["bury"] == 1


def test_what_a_broken_device_had_goes_back_and_it_takes_nothing_for_a_while() -> None:
    server = FakeServer()
    server.waiting.extend([entry(1), entry(2, "no vector")])
    with consuming(server, Picky(), self_check=lambda: False):
        wait_until(lambda: server.given_back)
        server.waiting.append(entry(3))
        server.claims.append(Claimed(0, [entry(1)]))
        reads = server.done["read"]
        with pytest.raises(AssertionError):
            wait_until(lambda: server.done["read"] > reads + 1, within_s=0.5)
    assert server.given_back == {b"1-0": 1, b"2-0": 1}  # it may be at fault: it counts
    assert not server.committed


def test_what_has_not_begun_goes_back_uncounted_when_the_worker_stops() -> None:
    server, encoder = FakeServer(), Picky()
    encoder.gate.clear()
    server.waiting.extend(entry(n) for n in range(1, 4))
    server.waiting.append(entry(4, prompt="unknown"))
    with consuming(server, encoder, stream_max_latency_ms=100, stream_batch_size=3) as one:
        wait_until(lambda: one._batcher.waiting_texts == 0 and one._in_flight)
        server.waiting.extend(entry(n) for n in range(5, 8))
        wait_until(lambda: one._batcher.waiting_texts)
        one.drain(10)
        one._batcher.drain()
        encoder.gate.set()
        committed(server, _1="response", _2="response", _3="response")
    assert server.given_back.keys() >= {b"5-0", b"6-0", b"7-0"}
    assert set(server.given_back.values()) == {0}
    assert server.given_back.keys() | {one.encode() for one in server.committed} == {
        f"{n}-0".encode() for n in range(1, 8)
    }


def test_an_unforeseen_error_of_a_commit_ends_no_thread() -> None:
    server = FakeServer()
    server.failures["commit"].append(ValueError("unforeseen"))
    server.waiting.append(entry(1))
    with consuming(server) as one:
        wait_until(lambda: server.done["commit"] and not one._held)
        server.waiting.append(entry(2))
        committed(server, _2="response")


def test_vectors_are_kept_while_the_server_is_away() -> None:
    server = FakeServer()
    server.failures["commit"].extend([AWAY, AWAY])
    server.waiting.append(entry(1))
    with consuming(server):
        committed(server, _1="response")
    assert server.done["commit"] == 3


def test_commits_do_not_wait_for_upkeep_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consumer, "AGAIN_S", 60)
    server = FakeServer()
    server.failures["say_load"].append(AWAY)
    with consuming(server):
        wait_until(lambda: server.done["say_load"])
        for number in (1, 2):
            server.waiting.append(entry(number))
            committed(server, **{f"_{number}": "response"})
    assert server.done["say_load"] == 1
