"""``sutra stream`` as a person uses it, without a fleet."""

import os
import signal

import pytest

from sutra_tasks import keys
from tests.system.stream_commands import begin, run

__all__ = ["begin"]


def test_a_line_is_sent_at_once_and_ctrl_c_sends_what_was_read(stream, begin, wait_until):
    sending = begin("send", stream.name)
    sending.stdin.write(b"one\nand half")
    sending.stdin.flush()
    wait_until(lambda: stream.size() == 1)
    sending.send_signal(signal.SIGINT)
    wait_until(lambda: stream.size() == 2)
    assert sending.wait(20) == 130
    assert sending.stderr.read() == b"sent 2 texts\n"


@pytest.mark.parametrize(
    ("options", "given"),
    [
        ([], "one ü\r\ntwo\r\n".encode("utf-8-sig")),
        ([], "one ü\rtwo".encode("utf-16")),
        (["--encoding", "latin-1"], "one ü\ntwo\n".encode("latin-1")),
        (["--jsonl"], '{"text": "one ü"}\r\n\r\n{"text": "two"}\r\n'.encode("utf-8-sig")),
    ],
)
def test_standard_input_is_read_as_it_is(stream, options, given):
    code, _, error = run("send", stream.name, *options, stdin=given)
    assert (code, error) == (0, "sent 2 texts\n")
    sent = stream.client.xrange(stream.key("in"))
    assert [fields[b"text"].decode() for _, fields in sent] == ["one ü", "two"]


@pytest.mark.parametrize(
    ("options", "given", "said"),
    [
        (
            [],
            b"fine\n\xff\xfe\n",
            "line 2: not UTF-8; --encoding names another. All lines before it were",
        ),
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
    assert client.smembers(keys.streams()) == set()
    assert run("delete", stream.name)[0] == 1


def test_dead_letters_are_shown_without_their_text_and_sent_again(stream, client):
    client.sadd(keys.streams(), stream.name)
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


def test_a_dead_letter_that_the_server_refuses_to_add_is_kept(stream, client):
    client.sadd(keys.streams(), stream.name)
    client.set(stream.key("in"), "closed")
    letter = {"text": "x", "id": "[/b]\x1b[31m[red]7", "reason": "they died"}
    client.xadd(stream.key("dead"), letter)
    code, _, error = run("dead-letters", stream.name, "--retry")
    assert (code, "WRONGTYPE" in error, "Traceback" in error) == (1, True, False)
    assert stream.size("dead") == 1
    assert "[/b]\\x1b[31m[red]7" in run("dead-letters", stream.name)[1]
