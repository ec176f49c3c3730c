"""Streams through real devices: what goes in comes out once, as what it is."""

import itertools
import json
import random
from threading import Thread

import pytest
import redis

from sutra_tasks import embed, keys
from sutra_tasks.streaming.client.producer import StreamProducer
from sutra_tasks.streaming.client.reader import StreamReader
from sutra_tasks.streaming.entries import StreamEntry
from sutra_tasks.streaming.metrics import StreamMetrics
from tests.system.streams import STREAMED, chunks_of
from tests.system.work import Work

CUT = {"block_size": 34, "overlap_tokens": 8}
WORDS = ("word", "sütra", "文字", "🙂🙂", "e\u0301t\u0301", "x", "longer-than-most", "end.")
GAPS = (" ", "  ", "\n", "\n\n", "\u3000", "\t")


def prose(seed: int, words: int) -> str:
    chosen = random.Random(seed)
    return "".join(chosen.choice(WORDS) + chosen.choice(GAPS) for _ in range(words))


def in_pieces(seed: int, text: str, most: int) -> list[bytes]:
    """Split a text at arbitrary bytes; some of the pieces are empty."""
    chosen, whole, at, found = random.Random(seed), text.encode(), 0, list[bytes]()
    while at < len(whole):
        size = chosen.randint(0, most)
        found.append(whole[at : at + size])
        at += size
    return found


@pytest.mark.parametrize("devices", [1, 3])
def test_texts_come_back_once_each_with_their_vectors(start_fleet, stream, wait_until, devices):
    with start_fleet(devices, **STREAMED):
        stream.add(f"text {n}" for n in range(1000))
        text = prose(0, 1500)
        stream.write("text", *in_pieces(0, text, 2000))
        stream.check()
        stream.check_text("text", text, chunks_of(text))
        assert stream.repeats() == 0
        assert stream.size() == 0

        # What the devices say they did adds up to what was done.
        def said() -> StreamMetrics:
            total = StreamMetrics()
            for key in stream.client.scan_iter(keys.stream_consumer("*")):
                for one in json.loads(stream.client.get(key) or "{}").values():
                    total = total.plus(StreamMetrics.from_json(one))
            return total

        total = len(stream.written)
        wait_until(lambda: said().chunks == total and said().checked)
        found = said()
        assert sum(found.latency.values()) == sum(found.formation.values()) == total
        assert sum(found.chunk.values()) == total
        assert found.errors == 0
        whole = len("".join(stream.sent.values()) + text)
        assert found.chars - found.overlap_chars == whole < found.chars
        assert found.consistency == pytest.approx(1.0, abs=1e-4)


def test_a_long_text_comes_in_overlapping_chunks_that_cover_it(start_fleet, stream):
    text = prose(1, 700)
    expected = chunks_of(text, block=34, overlap=8)
    with start_fleet(1, **STREAMED, **CUT):
        stream.xadd({"id": "long", "text": text})
        stream.await_that(lambda: len(stream.written) == len(expected))
    chunks = [chunk for chunk, _ in stream.written]
    assert [(c.id, c.start, c.end) for c in chunks] == [
        (f"long#{n}", one.start, one.end) for n, one in enumerate(expected)
    ]
    assert all(after.start < before.end for before, after in itertools.pairwise(chunks))
    assert (chunks[0].start, chunks[-1].end) == (0, len(text))
    stream.check_vectors([text[c.start : c.end] for c in chunks], [row for _, row in stream.written])


def test_what_cannot_be_embedded_is_an_error_by_itself(start_fleet, stream):
    wrong: dict[str, dict[str, str | bytes]] = {
        "prompt": {"text": "x", "prompt": "no such prompt"},
        "bytes": {"text": b"not \xff UTF-8"},
        "textless": {},
        "over-long": {"text": "a" * 5001},
        "priority": {"text": "x", "priority": "high"},
        "gap": {"text": "x", "key": "k", "seq": "3"},
    }
    with start_fleet(1, max_text_chars=5000, **STREAMED):
        for name, fields in wrong.items():
            stream.add(f"beside {name} {n}" for n in range(20))
            stream.xadd({"id": name, **fields})
        # Of a text in pieces, what is wrong is given up, and it goes on.
        stream.write("broken", b"good ", b"bad \xff", b"", end=True)
        stream.await_that(lambda: len(stream.errors) > len(wrong))
        (text_id,) = stream.errors.keys() - wrong
        stream.check(wrong={*wrong, text_id})
    assert {name: stream.errors[name].error for name in wrong} == {
        "prompt": "InvalidOptionError",
        "bytes": "InvalidTextError",
        "textless": "InvalidTextError",
        "over-long": "TooLargeError",
        "priority": "InvalidOptionError",
        "gap": "InvalidTextError",
    }
    assert stream.errors[text_id].error == "InvalidTextError"


def test_pieces_give_the_chunks_of_the_whole_whoever_reads_them(start_fleet, stream):
    texts = {f"key {n}": prose(n, 400) for n in range(8)}
    entries: list[list[dict[str, str | bytes]]] = []
    for n, (key, text) in enumerate(texts.items()):
        pieces = in_pieces(n, text, 5 + 20 * n)
        entries.append([{"key": key, "text": one} for one in pieces])
        entries[-1][-1]["end"] = "1"
    chosen = random.Random(0)
    with start_fleet(3, **STREAMED, **CUT):
        while entries:  # interleaved, but each in its order
            mine = chosen.choice(entries)
            count = chosen.randint(1, 50)
            stream.xadd(*mine[:count])
            del mine[:count]
            entries = [one for one in entries if one]
        for key, text in texts.items():
            stream.check_text(key, text, chunks_of(text, block=34, overlap=8))
    assert stream.errors == {}
    assert stream.repeats() == 0


def test_a_key_may_name_one_text_after_the_other(start_fleet, stream):
    with start_fleet(2, **STREAMED):
        for n in range(20):
            stream.write("again", f"text {n}".encode(), b" and its end")
        stream.await_that(lambda: len(stream.written) == 20)
        rows = [row for _, row in stream.written]
        stream.check_vectors([f"text {n} and its end" for n in range(20)], rows)
        assert len(stream.by_id()) == 20


def test_a_text_that_stands_still_is_flushed_and_goes_on(start_fleet, stream):
    first, then = prose(5, 40), prose(6, 60)
    with start_fleet(2, stream_idle_flush_s=0.3, **STREAMED, **CUT):
        stream.write("slow", first.encode(), end=False)
        stream.await_that(lambda: [c for c in stream.of_text("slow") if c.flushed == "idle"])
        flushed = stream.of_text("slow")[-1]
        assert (flushed.end, flushed.overlap_next) == (len(first), True)
        stream.write("slow", then.encode())
        stream.await_that(lambda: not stream.of_text("slow")[-1].overlap_next)
    chunks = stream.of_text("slow")
    assert [one.number for one in chunks] == list(range(len(chunks)))
    assert chunks[-1].end == len(first + then)
    assert chunks[-1].flushed is None
    assert all(after.start <= before.end for before, after in itertools.pairwise(chunks))
    text = first + then
    stream.check_vectors([text[c.start : c.end] for c in chunks], [row for _, row in stream.written])


def test_tasks_do_not_wait_for_a_flooded_stream(start_fleet, stream):
    with start_fleet(1, simulated_fixed_s=0.02, batch_texts=64, **STREAMED):
        stream.add(f"flood {n}" for n in range(6_000))
        took = []
        while (before := stream.size()) > 2_000:
            embed.delay(f"a task {before}").get(timeout=20)
            took.append(before - stream.size())
        assert len(took) > 10
        assert sorted(took)[len(took) // 2] <= 6 * 64
        stream.check()


def test_a_stream_does_not_wait_for_a_flood_of_tasks(start_fleet, stream, client):
    with start_fleet(1, **STREAMED, simulated_per_token_s=0.0003, batch_tokens=1024) as fleet:
        work = Work(client)
        work.fill(fleet)
        stream.add(f"beside tasks {n}" for n in range(200))
        stream.check()
        assert work.in_flight() > 500
        work.check()


def test_an_output_that_nobody_reads_stops_the_devices(start_fleet, stream, wait_until):
    options = STREAMED | {"stream_output_size": 20}
    with start_fleet(2, **options) as fleet:
        stream.add(f"text {n}" for n in range(5000))
        wait_until(lambda: stream.size("out") >= 20 and not stream.pending())
        assert 0 < stream.size() == stream.size()
        assert stream.size("out") <= 20 + 2 * 32  # and what two devices were at
        got: set[str] = set()
        with StreamReader(stream.name, options=fleet.options, timeout_s=10) as reader:
            for response in reader:
                new = set(response.chunk_ids)
                assert not new & got
                got |= new
                if got == stream.sent.keys():
                    break
    assert got == stream.sent.keys()
    assert stream.size() == 0


def test_our_producers_stay_within_the_capacity_and_hear_the_throttle(start_fleet, stream, wait_until):
    options = STREAMED | {"stream_buffer_size": 100, "simulated_fixed_s": 0.05, "batch_texts": 8}
    sizes: list[int] = []
    with start_fleet(1, **options) as fleet, StreamProducer(stream.name, options=fleet.options) as one:
        texts = (StreamEntry(f"text {n}", id=f"s-{n}") for n in range(600))
        sending = Thread(target=one.send_many, args=(texts,))
        sending.start()
        rates = set()
        while sending.is_alive():
            sizes.append(stream.size())
            rates.add(one.throttle_rate)
        sending.join()
        stream.sent = {f"s-{n}": f"text {n}" for n in range(600)}
        assert max(sizes) <= 100
        assert min(rates) <= 0.8
        stream.check()
        state = stream.client.hgetall(stream.key("state"))
        assert int(state[b"capacity"]) == 100
        # A busy machine alone may keep the level up.
        wait_until(
            lambda: (
                stream.client.hget(stream.key("state"), "level") == b"0"
                or float(stream.client.hget(stream.key("state"), "load") or 0) >= 0.5
            )
        )


def test_a_producer_that_ignores_the_limit_is_stopped_and_what_it_added_is_delivered(
    start_fleet, stream, wait_until
):
    options = STREAMED | {"stream_buffer_size": 50, "simulated_fixed_s": 0.01, "batch_texts": 16}
    with start_fleet(1, **options):
        accepted = 0

        def is_stopped() -> bool:
            try:
                stream.xadd({"id": f"s-{accepted}", "text": f"text {accepted}"})
            except redis.ResponseError:
                return True
            stream.sent[f"s-{accepted}"] = f"text {accepted}"
            return False

        while not is_stopped():
            accepted += 1
        assert accepted >= 100
        stream.check()
        wait_until(lambda: stream.client.type(stream.key("in")) == b"stream")
        stream.add(["and then"])
        stream.check()
        assert stream.repeats() == 0
