"""``sutra stream`` as a person uses it, with one fleet for all tests."""

import json
import signal
from dataclasses import replace
from itertools import count, pairwise

import numpy as np
import pytest
import redis

from sutra_tasks import keys
from sutra_tasks.engines.simulated_engine import vectors_of
from sutra_tasks.settings import Settings
from sutra_tasks.streaming.client.producer import StreamProducer
from sutra_tasks.streaming.client.reader import StreamReader
from tests.system.conftest import BRISK, clean
from tests.system.local_fleet import local_fleet
from tests.system.stream_commands import begin, run
from tests.system.streams import Stream

__all__ = ["begin"]

_numbers = count()


@pytest.fixture(scope="module")
def fleet_client(server, tmp_path_factory):
    """Give a client of the server on which a fleet of one device runs."""
    options = replace(Settings(broker_url=server), **BRISK)
    folder = tmp_path_factory.mktemp("fleet")
    with clean(redis.Redis.from_url(server)) as client:
        with local_fleet(options, client, folder):
            yield client
        client.delete(keys.streams(), *client.scan_iter(keys.stream("*", "*")))


@pytest.fixture
def stream(fleet_client):
    """Give a stream that no other test has used."""
    return Stream(fleet_client, f"s{next(_numbers)}")


def lines(out):
    return [json.loads(line) for line in out.splitlines()]


def test_lines_that_are_sent_come_out_as_vectors(stream):
    code, _, said = run("send", stream.name, stdin=b"one\n\ntwo\r\nthree")
    assert (code, said) == (0, "sent 3 texts\n")
    code, out, _ = run("read", stream.name, "--timeout", "2")
    found = lines(out)
    assert code == 0
    got = np.array(sorted(one["vector"] for one in found))
    expected = np.array(sorted(vectors_of(["one", "two", "three"], 384).tolist()))
    assert np.allclose(got, expected, atol=1e-6)
    assert [(one["start"], one["overlap_next"]) for one in found] == [(0, False)] * 3


def test_json_lines_keep_their_ids_and_standard_input_can_be_one_text(stream):
    text = "a word and another one, " * 2_000
    assert run("send", stream.name, "--jsonl", stdin=b'{"text": "x", "id": "7"}\n')[0] == 0
    code, _, said = run("send", stream.name, "--key", "book", stdin=text.encode())
    assert code == 0
    assert "pieces of book" in said
    _, out, _ = run("read", stream.name, "--timeout", "2", "--no-vectors")
    found = lines(out)
    assert [one["id"] for one in found if "key" not in one] == ["7"]
    chunks = sorted((one["start"], one["end"], one["overlap_next"]) for one in found if "key" in one)
    assert chunks[0][0] == 0
    assert chunks[-1][1:] == (len(text), False)
    assert all(after[0] <= before[1] for before, after in pairwise(chunks))
    assert not any("vector" in one for one in found)


def test_what_a_reader_printed_is_not_printed_again(stream, begin, wait_until):
    stream.add(["one", "two"])
    reading = begin("read", stream.name, "--no-vectors")
    wait_until(lambda: stream.client.exists(stream.key("out")) and stream.size("out") == 0)
    reading.send_signal(signal.SIGINT)
    assert reading.wait(20) == 130
    assert len(lines(reading.stdout.read().decode())) == 2
    assert run("read", stream.name, "--timeout", "1") == (0, "", "")


def test_the_status_shows_backlog_and_the_last_minute(stream, wait_until):
    stream.add(["one", "two"])

    def shown():
        return json.loads(run("status", stream.name, "--json")[1])[0]

    wait_until(lambda: shown()["last_minute"]["chunks"] == 2)
    found = shown()
    assert found["capacity"] == 10_000
    assert found["unread"] >= 1
    assert found["last_minute"]["latency_ms"]["p95"] > 0
    code, out, _ = run("status")
    assert code == 0
    assert stream.name in out
    assert run("status", "nope")[0] == 1
    assert run("read", "no such")[0] == 1


def test_a_stream_with_a_fault_costs_no_other_anything_and_is_named(stream, wait_until):
    bad = f"{stream.name}-bad"
    stream.client.sadd(keys.streams(), bad)
    stream.client.lpush(keys.stream(bad, "in"), "x")
    stream.add(["one", "two"])
    _, out, _ = run("read", stream.name, "--timeout", "2", "--no-vectors")
    assert [one["id"] for one in lines(out)] == list(stream.sent)

    def faults():
        return json.loads(run("status", bad, "--json")[1])[0]["faults"]

    assert any(f"{keys.stream(bad, 'in')} is a list" in one for one in faults())
    wait_until(lambda: any(one.startswith("read: WRONGTYPE") for one in faults()))
    assert f"stream {bad}: " in run("status")[1].replace("\n", "")
    code, _, error = run("send", bad, stdin=b"x\n")
    assert (code, "WRONGTYPE" in error, "Traceback" in error) == (1, True, False)
    assert run("delete", bad)[0] == 1
    assert run("delete", bad, "--force")[0] == 0


class HandlerError(Exception):
    """The body of a loop fails."""


def fail_on(reader, name, text):
    for response in reader:
        assert response.chunk_ids == (name,)
        assert np.allclose(response.embeddings, vectors_of([text], 384), atol=1e-6)
        raise HandlerError


def test_a_response_comes_until_it_is_handled_and_a_number_names_one_text_after_the_other(stream):
    with (
        StreamProducer(stream.name) as producer,
        StreamReader(stream.name, timeout_s=20) as reader,
    ):
        for text in ("one", "another", "one"):
            assert producer.send(text, id=42) == "42"
            for _ in range(2):
                with pytest.raises(HandlerError):
                    fail_on(reader, "42", text)
            assert next(iter(reader)).chunk_ids == ("42",)
            reader.acknowledge()
    code, out, _ = run("send", stream.name, "--jsonl", stdin=b'{"text": "x", "id": 7}\n')
    assert code == 0
    _, out, _ = run("read", stream.name, "--timeout", "2", "--no-vectors")
    assert [one["id"] for one in lines(out)] == ["7"]
