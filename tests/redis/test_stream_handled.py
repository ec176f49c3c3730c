"""Readers on a real server: a response comes until it is handled; an unreadable one is kept aside."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from sutra_tasks import keys
from sutra_tasks.cli.stream_status import run_dead
from sutra_tasks.errors import StreamFaultError
from sutra_tasks.settings import Settings
from sutra_tasks.streaming.client.reader import StreamReader
from sutra_tasks.streaming.client.reader_core import FETCH
from sutra_tasks.streaming.responses import StreamingError
from sutra_tasks.streaming.status import stream_status
from tests.redis.stream_clients import READERS, Reader
from tests.redis.stream_output import DEAD, OUT, S, corrupt, ids_of, left, pending, respond, respond_to
from tests.redis.streams.peers import written

if TYPE_CHECKING:
    import redis

NAMES = [(name,) for name in "abcde"]


@pytest.fixture(autouse=True)
def _swept(_nothing_is_left_behind: None, client: redis.Redis) -> Iterator[None]:
    yield
    client.delete(OUT, DEAD, keys.streams())


@pytest.fixture
def options(url: str) -> Settings:
    return Settings(broker_url=url)


@pytest.fixture(params=READERS)
def open_reader(request: pytest.FixtureRequest, options: Settings) -> Any:
    """Make a reader of each kind; without ``with``, the test closes it."""
    given = {"options": options, "timeout_s": 0.2, "claim_s": 1000}
    return lambda **more: READERS[request.param](S, **{**given, **more})


class HandlerError(Exception):
    """The body of a loop fails."""


def handle(reader: Reader, *, failing: str = "", stopping: str = "") -> list[tuple[str, ...]]:
    """Iterate over a reader; return what was handled before the body failed or stopped."""
    handled = []
    for response in reader:
        if failing in (names := ids_of(response)):
            raise HandlerError
        if stopping in names:
            break
        handled.append(names)
    return handled


# A response that was being handled comes again.


def test_a_response_whose_handler_raised_comes_again_to_the_next_iteration(
    client: redis.Redis, open_reader: Any
) -> None:
    for names in NAMES:
        respond(client, *names)
    reader = open_reader()
    for _ in range(3):  # as often as it fails
        with pytest.raises(HandlerError):
            handle(reader, failing="c")
    assert left(client) >= 3
    assert handle(reader) == NAMES[2:]
    assert left(client) == 0
    reader.close()


def test_a_response_at_which_the_loop_was_left_comes_again(
    client: redis.Redis, open_reader: Any
) -> None:
    for names in NAMES:
        respond(client, *names)
    reader = open_reader()
    assert handle(reader, stopping="b") == NAMES[:1]
    assert handle(reader, stopping="d") == NAMES[1:3]
    reader.acknowledge()  # there is none in hand: an iteration begins with it
    assert handle(reader) == NAMES[4:]
    reader.close()


@pytest.mark.parametrize("how", ["failing", "stopping"])
def test_a_closed_reader_leaves_to_others_what_it_did_not_handle(
    client: redis.Redis, open_reader: Any, how: str
) -> None:
    for names in NAMES:
        respond(client, *names)
    if how == "failing":
        with pytest.raises(HandlerError), open_reader() as reader:
            handle(reader, failing="b")
    else:
        with open_reader() as reader:
            handle(reader, stopping="b")
    assert left(client) == 4
    with open_reader() as reader:
        assert handle(reader) == NAMES[1:]
    assert (left(client), pending(client)) == (0, [])


def test_a_handled_response_stays_handled_though_the_next_one_fails(
    client: redis.Redis, open_reader: Any
) -> None:
    for number in range(FETCH + 1):
        respond(client, f"{number}")
    with pytest.raises(HandlerError), open_reader() as reader:
        handle(reader, failing=f"{FETCH}")
    assert left(client) == 1


def test_what_was_acknowledged_in_the_body_does_not_come_again(
    client: redis.Redis, open_reader: Any
) -> None:
    for names in NAMES:
        respond(client, *names)
    with open_reader() as reader:
        for _ in reader:
            reader.acknowledge()
            break
        assert left(client) == 4
        assert handle(reader) == NAMES[1:]


def test_a_reader_that_was_closed_begins_anew_with_what_others_left(
    client: redis.Redis, open_reader: Any
) -> None:
    for names in NAMES:
        respond(client, *names)
    with open_reader() as reader, open_reader() as other:
        handle(reader, stopping="b")
        run_close(reader)
        assert handle(other, stopping="d") == NAMES[1:3]
        assert handle(reader) == []
        assert handle(other) == NAMES[3:]


def run_close(reader: Reader) -> None:
    """Close a reader in the middle of its ``with`` block."""
    if isinstance(reader, StreamReader):
        reader.close()
    else:
        reader._run(reader._one.close())


def test_a_caller_that_handles_many_at_once_acknowledges_them_together(
    client: redis.Redis, open_reader: Any
) -> None:
    for number in range(3 * FETCH):
        respond(client, f"{number}")

    def read_some(reader: Reader, count: int) -> list[Any]:
        return [ids_of(response) for response, _ in zip(reader, range(count), strict=False)]

    with open_reader(auto_acknowledge=False) as reader:
        first = read_some(reader, 20)
        assert left(client) == 3 * FETCH
        assert read_some(reader, 20) == first  # the first attempt to store them failed
        reader.acknowledge()
        assert left(client) == 3 * FETCH - 21  # zip asked for one more
        assert len(read_some(reader, 1000)) == 3 * FETCH - 21
    assert left(client) == 3 * FETCH - 21
    with open_reader() as reader:
        assert len(handle(reader)) == 3 * FETCH - 21


# Repeats and news.


def test_an_id_with_another_text_is_news_and_an_entry_that_comes_again_is_not(
    client: redis.Redis, open_reader: Any
) -> None:
    def entries(reader: Reader) -> list[str | None]:
        return [chunk.entry for one in reader for chunk in one.chunks]  # type: ignore[union-attr]

    with open_reader() as reader:
        for text, entry in (("one", "1-0"), ("two", "2-0"), ("one", "3-0")):
            respond_to(client, "42", text, entry)
            assert entries(reader) == [entry]
        respond_to(client, "42", "two", "2-0")  # delivered again, late
        respond_to(client, "42", "one", "4-0")  # a producer sent it again
        assert entries(reader) == []
        respond_to(client, "42", "two", "5-0")
        assert entries(reader) == ["5-0"]
    assert left(client) == 0


FORKED = """
import os, sys

from sutra_tasks import Settings, StreamReader

reader = StreamReader("s", options=Settings(broker_url=sys.argv[1]), timeout_s=0.2, claim_s=1000)
first = next(iter(reader)).chunk_ids
pid = os.fork()
found = [response.chunk_ids for response in reader]
print(sorted(found), flush=True)
reader.close()
if not pid:
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
"""


def test_a_forked_child_does_not_read_what_its_parent_has(client: redis.Redis, url: str) -> None:
    for number in range(FETCH + 2):
        respond(client, f"{number}")
    done = subprocess.run(
        [sys.executable, "-c", FORKED, url], check=True, timeout=60, capture_output=True, text=True
    )
    parts = [ast.literal_eval(line) for line in done.stdout.splitlines()]
    assert sorted(name for part in parts for (name,) in part) == sorted(map(str, range(FETCH + 2)))
    assert left(client) == 0


# What cannot be read.

UNREADABLE: list[tuple[dict[str, Any], str]] = [
    ({"v": "2", "chunks": '[{"id":"new"}]'}, "UnsupportedVersionError"),
    ({"v": ""}, "UnsupportedVersionError"),
    ({}, "CorruptResultError"),
    ({"kind": "error", "ids": "["}, "CorruptResultError"),
    ({"chunks": "[]", "vectors": b""}, "CorruptResultError"),
    ({"chunks": '[{"id":"a"}]', "vectors": b"\0\0\0\0"}, "CorruptResultError"),
    ({"chunks": '[{"id":[],"start":0,"end":1,"at":1}]', "vectors": b"\0\0\0\0"}, "CorruptResultError"),
]


@pytest.mark.parametrize(("fields", "error"), UNREADABLE)
def test_a_response_that_cannot_be_read_is_told_kept_aside_and_passed(
    client: redis.Redis, open_reader: Any, options: Settings, fields: dict[str, Any], error: str
) -> None:
    client.sadd(keys.streams(), S)
    respond(client, "a")
    bad = corrupt(client, **fields)
    respond(client, "b")
    with open_reader() as reader:
        first, told, second = list(reader)
    assert (first.chunk_ids, second.chunk_ids) == (("a",), ("b",))
    assert isinstance(told, StreamingError)
    assert (told.entry_id.encode(), told.error) == (bad, error)
    assert "sutra stream dead-letters s" in told.message
    assert left(client) == 0
    assert stream_status(client, S)[0].dead == 1
    (letter,) = written(client, DEAD)
    assert letter[b"unreadable"] == bad
    run_dead(options, S, retry=True, drop=False)  # after an upgrade of the readers
    (again,) = written(client, OUT)
    assert again == {b"v": b"1", b"kind": b"response"} | {
        name.encode(): value if isinstance(value, bytes) else value.encode()
        for name, value in fields.items()
    }
    assert client.xlen(DEAD) == 0


def test_the_ids_of_a_response_that_cannot_be_read_are_told_if_they_can(
    client: redis.Redis, open_reader: Any
) -> None:
    corrupt(client, v="2", chunks='[{"id":"new"}]')
    with open_reader() as reader:
        (told,) = list(reader)
    assert told.chunk_ids == ("new",)


def test_a_response_that_cannot_be_read_stays_until_its_error_is_handled(
    client: redis.Redis, open_reader: Any
) -> None:
    corrupt(client, v="2")
    with open_reader() as reader:
        for _ in range(2):
            assert next(iter(reader)).error == "UnsupportedVersionError"
    assert (left(client), client.xlen(DEAD)) == (1, 0)


# A stream that the server refuses to read.


def test_an_output_of_another_type_is_named_and_its_reader_goes_on_when_it_is_gone(
    client: redis.Redis, open_reader: Any
) -> None:
    client.set(OUT, "x")
    with open_reader() as reader:
        with pytest.raises(StreamFaultError, match="stream s: WRONGTYPE"):
            handle(reader)
        client.delete(OUT)
        respond(client, "a")
        assert handle(reader) == [("a",)]


def test_a_reader_makes_no_key_of_a_stream_that_was_deleted(
    client: redis.Redis, open_reader: Any
) -> None:
    client.sadd(keys.streams(), S)
    with open_reader() as reader:
        assert handle(reader) == []
        assert client.exists(OUT) == 1
        client.delete(keys.streams(), OUT)
        assert handle(reader) == []
        assert client.exists(OUT) == 0
