"""``sutra stream`` as a person uses it."""

import json
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from sutra_tasks import keys
from sutra_tasks.engines.simulated_engine import vectors_of

SUTRA = str(Path(sys.executable).with_name("sutra"))


def run(*arguments, stdin=b""):
    done = subprocess.run(
        [SUTRA, "stream", *arguments], input=stdin, capture_output=True, timeout=60, check=False
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def lines(out):
    return [json.loads(line) for line in out.splitlines()]


@pytest.fixture
def begin():
    """Start a command that a test ends."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*arguments):
        one = subprocess.Popen(
            [SUTRA, "stream", *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        started.append(one)
        return one

    yield start
    for one in started:
        one.kill()
        one.communicate()


def test_lines_that_are_sent_come_out_as_vectors(start_fleet, stream):
    with start_fleet():
        code, _, said = run("send", stream.name, stdin=b"one\n\ntwo\r\nthree")
        assert (code, said) == (0, "sent 3 texts\n")
        code, out, _ = run("read", stream.name, "--timeout", "2")
    found = lines(out)
    assert code == 0
    got = np.array(sorted(one["vector"] for one in found))
    expected = np.array(sorted(vectors_of(["one", "two", "three"], 384).tolist()))
    assert np.allclose(got, expected, atol=1e-6)
    assert [(one["start"], one["overlap_next"]) for one in found] == [(0, False)] * 3


def test_json_lines_keep_their_ids_and_standard_input_can_be_one_text(start_fleet, stream):
    text = "a word and another one, " * 2_000
    with start_fleet():
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


def test_a_line_is_sent_at_once_and_ctrl_c_sends_what_was_read(stream, begin, wait_until):
    sending = begin("send", stream.name)
    sending.stdin.write(b"one\nand half")
    sending.stdin.flush()
    wait_until(lambda: stream.size() == 1)
    sending.send_signal(signal.SIGINT)
    wait_until(lambda: stream.size() == 2)
    assert sending.wait(20) == 130
    assert sending.stderr.read() == b"sent 2 texts\n"


def test_what_a_reader_printed_is_not_printed_again(start_fleet, stream, begin, wait_until):
    with start_fleet():
        stream.add(["one", "two"])
        reading = begin("read", stream.name, "--no-vectors")
        wait_until(lambda: stream.client.exists(stream.key("out")) and stream.size("out") == 0)
        reading.send_signal(signal.SIGINT)
        assert reading.wait(20) == 130
        assert len(lines(reading.stdout.read().decode())) == 2
        assert run("read", stream.name, "--timeout", "1") == (0, "", "")


@pytest.mark.parametrize(
    ("options", "given", "said"),
    [
        ([], b"fine\n\xff\xfe\n", "line 2: not UTF-8. All lines before it were sent"),
        (["--jsonl"], b'{"text": "fine"}\n[1]\n', 'line 2: expected a JSON object with "text"'),
        (["--jsonl"], b'{"text": "fine"}\n{"text": 1}\n', "a str is needed, not int"),
        (["--key", "k"], b"fine" * 20_000 + b"\xff\xff", "standard input is not UTF-8"),
    ],
)
def test_bad_input_is_named_and_what_came_before_it_is_sent(stream, options, given, said):
    code, _, error = run("send", stream.name, *options, stdin=given)
    assert code == 1
    assert said in error
    assert "Traceback" not in error
    assert stream.size() >= 1


def test_the_status_shows_backlog_and_the_last_minute(start_fleet, stream, wait_until):
    with start_fleet():
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


def test_follow_goes_on_until_ctrl_c(stream, begin, wait_until):
    stream.add(["one"])
    following = begin("status", "--follow")
    os.set_blocking(following.stdout.fileno(), False)
    seen = b""

    def shown():
        nonlocal seen
        seen += following.stdout.read() or b""
        return stream.name.encode() in seen

    wait_until(shown)
    following.send_signal(signal.SIGINT)
    assert following.wait(20) == 130


def test_a_stream_that_holds_work_is_deleted_by_force_only(stream, client):
    stream.add(["one"])
    code, _, error = run("delete", stream.name)
    assert code == 1
    assert "1 entries wait" in error
    assert stream.size() == 1
    assert run("delete", stream.name, "--force")[0] == 0
    assert list(client.scan_iter(keys.stream(stream.name, "*"))) == []
    assert client.smembers(keys.STREAMS) == set()
    assert run("delete", stream.name)[0] == 1


def test_dead_letters_are_shown_without_their_text_and_sent_again(stream, client):
    client.sadd(keys.STREAMS, stream.name)
    client.xadd(
        stream.key("dead"), {"text": "secret", "id": "7", "reason": "they died", "deliveries": 3}
    )
    client.xadd(
        stream.key("dead"),
        {"text": "part", "key": "k", "source": "9", "position": 40, "reason": "they died"},
    )
    code, out, _ = run("dead-letters", stream.name)
    assert code == 0
    assert "they died" in out
    assert "secret" not in out
    assert run("dead-letters", stream.name, "--retry")[1] == "2 sent again\n"
    assert [fields for _, fields in client.xrange(stream.key("in"))] == [
        {b"text": b"secret", b"id": b"7"},
        {b"text": b"part", b"id": b"9@40"},
    ]
    assert stream.size("dead") == 0
    assert run("dead-letters", stream.name)[1] == "no dead letters\n"
