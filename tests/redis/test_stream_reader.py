"""Readers on a real server: every response until it is acknowledged, no chunk twice, whoever dies."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import pytest
import redis

from sutra_tasks import connections, keys
from sutra_tasks.errors import BrokerNotConfiguredError, InvalidOptionError
from sutra_tasks.settings import Settings
from sutra_tasks.streaming.client.reader import AsyncStreamReader, StreamReader
from sutra_tasks.streaming.client.reader_core import FETCH
from sutra_tasks.streaming.responses import error_fields
from tests.conftest import wait_until
from tests.redis.peers import full_memory
from tests.redis.stream_clients import READERS, Reader, vanish
from tests.redis.stream_output import OUT, S, consumers, ids_of, left, pending, respond
from tests.system.durable_server import DurableServer

QUIET_S = 0.2


@pytest.fixture(autouse=True)
def _swept(_nothing_is_left_behind: None, client: redis.Redis) -> Iterator[None]:
    """Only what was not acknowledged lasts."""
    yield
    client.delete(OUT)


@pytest.fixture
def options(url: str) -> Settings:
    return Settings(broker_url=url)


class Open(Protocol):
    """Makes a reader of each kind; the test closes it."""

    def __call__(self, **options: Any) -> Reader: ...


@pytest.fixture(params=READERS)
def open_reader(request: pytest.FixtureRequest, options: Settings) -> Open:
    return lambda **given: READERS[request.param](
        S, **{"options": options, "timeout_s": QUIET_S, **given}
    )


class Read(Protocol):
    """Reads with one reader until its iteration ends or ``enough`` were seen; returns the ids."""

    def __call__(self, enough: int = 10**6, fail: bool = False, **options: Any) -> list[Any]: ...


@pytest.fixture
def read(open_reader: Open) -> Read:
    """A reader, used as its documentation says; ``fail``: the last one seen is not handled."""

    def read_some(enough: int = 10**6, fail: bool = False, **given: Any) -> list[Any]:
        seen: list[Any] = []
        with open_reader(**given) as reader:
            for response in reader:
                seen.append(ids_of(response))
                if len(seen) == enough and fail:
                    raise KeyboardInterrupt
                if len(seen) == enough:
                    reader.acknowledge()
                    break
        return seen

    return read_some


# What is read.


def test_everything_is_read_in_order_and_gone(client: redis.Redis, read: Read) -> None:
    written = [(f"{number}a", f"{number}b") for number in range(40)]
    for ids in written:
        respond(client, *ids)
    client.xadd(OUT, dict(zip(*[iter(error_fields(["e"], ValueError("no")))] * 2, strict=True)))
    assert read() == [*written, ("e",)]
    assert (left(client), pending(client), consumers(client)) == (0, [], [])


def test_a_stream_need_not_exist_and_a_reader_makes_none(client: redis.Redis, read: Read) -> None:
    assert read() == []
    assert client.keys() == []
    respond(client, "a")
    assert read() == [("a",)]


def test_what_comes_while_one_waits_is_read(client: redis.Redis, read: Read) -> None:
    threading.Timer(0.1, respond, [client, "a"]).start()
    assert read(1, timeout_s=20) == [("a",)]


def test_what_cannot_be_is_refused_when_a_reader_is_made(options: Settings) -> None:
    for kind in (StreamReader, AsyncStreamReader):
        with pytest.raises(InvalidOptionError, match="remember"):
            kind(S, remember=-1, options=options)
        with pytest.raises(InvalidOptionError, match="stream"):
            kind("a b", options=options)
        with pytest.raises(BrokerNotConfiguredError):
            kind(S, options=Settings())


# What is acknowledged.


def test_a_response_is_acknowledged_when_others_are_fetched(
    client: redis.Redis, open_reader: Open
) -> None:
    for number in range(FETCH + 1):
        respond(client, f"{number}")
    with open_reader() as reader:
        responses = iter(reader)
        for _ in range(FETCH):
            next(responses)
        assert left(client) == FETCH + 1
        next(responses)
        assert left(client) == 1
        reader.acknowledge()
        assert left(client) == 0


def test_who_leaves_has_handled_what_it_acknowledged_and_others_get_the_rest_at_once(
    client: redis.Redis, read: Read
) -> None:
    for number in range(10):
        respond(client, f"{number}")
    assert read(3) == [("0",), ("1",), ("2",)]
    assert left(client) == 7
    assert read(claim_s=1000) == [(f"{number}",) for number in range(3, 10)]
    assert left(client) == 0


def test_who_fails_has_not_handled_the_last_and_another_gets_it(client: redis.Redis, read: Read) -> None:
    for number in range(10):
        respond(client, f"{number}")
    with pytest.raises(KeyboardInterrupt):
        read(3, fail=True)
    assert left(client) == 8
    assert read(claim_s=1000) == [(f"{number}",) for number in range(2, 10)]
    assert left(client) == 0


def test_what_another_took_over_meanwhile_is_not_taken_back(
    client: redis.Redis, open_reader: Open
) -> None:
    first, second = respond(client, "a"), respond(client, "b")
    with pytest.raises(KeyboardInterrupt), open_reader() as reader:  # noqa: PT012 - dies in the block
        next(iter(reader))
        client.xclaim(OUT, keys.READERS_GROUP, "another", 0, [first, second], idle=10)
        raise KeyboardInterrupt
    found: Any = client.xpending_range(OUT, keys.READERS_GROUP, "-", "+", 10)
    assert {one["consumer"] for one in found} == {b"another"}
    assert max(one["time_since_delivered"] for one in found) < 60_000


def test_what_was_sent_to_a_reader_and_never_arrived_is_read_by_another(
    client: redis.Redis, open_reader: Open, read: Read
) -> None:
    respond(client, "a")
    respond(client, "b")
    with open_reader() as reader:
        assert ids_of(next(iter(reader))) == ("a",)
        reader.acknowledge()
        reader._core._fetched.clear()  # as if the answer had been lost on its way
    assert read(claim_s=1000) == [("b",)]
    assert left(client) == 0


# Repeats.


def test_what_was_seen_is_dropped_and_acknowledged(client: redis.Redis, read: Read) -> None:
    for ids in (["a", "b"], ["a"], ["b", "c", "a", "d"], ["d", "c"], ["e"]):
        respond(client, *ids)
    assert read() == [("a", "b"), ("c", "d"), ("e",)]
    assert left(client) == 0


def test_a_chunk_that_is_twice_in_a_response_is_seen_once(client: redis.Redis, read: Read) -> None:
    respond(client, "a", "b", "a")
    assert read() == [("a", "b")]


def test_repeats_are_known_as_far_back_as_was_asked_for(client: redis.Redis, read: Read) -> None:
    for name in "abcaab":
        respond(client, name)
    assert read(remember=2) == [("a",), ("b",), ("c",), ("a",), ("b",)]
    for name in "aa":
        respond(client, name)
    assert read(remember=0) == [("a",), ("a",)]


def test_errors_are_told_each_time(client: redis.Redis, read: Read) -> None:
    fields = dict(zip(*[iter(error_fields(["e"], ValueError("no")))] * 2, strict=True))
    for _ in range(2):
        client.xadd(OUT, fields)
    assert read() == [("e",), ("e",)]


# Several readers.


def test_readers_share_a_stream_and_each_response_goes_to_one(
    client: redis.Redis, open_reader: Open
) -> None:
    count, seen = 200, [list[str](), list[str]()]

    def run(mine: list[str]) -> None:
        with open_reader(timeout_s=2.0) as reader:
            for response in reader:
                mine += ids_of(response)
                if sum(map(len, seen)) == count:
                    reader.acknowledge()
                    return

    threads = [threading.Thread(target=run, args=[mine]) for mine in seen]
    for thread in threads:
        thread.start()
    for number in range(count):
        respond(client, f"{number}")
    for thread in threads:
        thread.join()
    assert sorted(seen[0] + seen[1]) == sorted(f"{number}" for number in range(count))
    assert all(mine == sorted(mine, key=int) for mine in seen)
    assert left(client) == 0


def test_what_a_reader_that_vanished_had_is_read_by_another_after_a_while(
    client: redis.Redis, open_reader: Open, read: Read
) -> None:
    for number in range(20):
        respond(client, f"{number}")
    gone = open_reader()
    responses = iter(gone)
    assert ids_of(next(responses)) == ("0",)
    mine: Any = pending(client)
    assert len(mine) == FETCH
    assert read(claim_s=1000) == [(f"{number}",) for number in range(FETCH, 20)]
    (one,) = consumers(client)
    client.xclaim(OUT, keys.READERS_GROUP, one["name"], 0, mine, idle=31_000, justid=True)
    assert read(claim_s=30) == [(f"{number}",) for number in range(FETCH)]
    assert left(client) == 0
    vanish(gone)


def test_what_nobody_has_any_more_is_no_response(
    client: redis.Redis, open_reader: Open, read: Read
) -> None:
    first = respond(client, "a")
    with pytest.raises(KeyboardInterrupt):
        read(1, fail=True)
    client.xdel(OUT, first)
    respond(client, "b")
    assert read() == [("b",)]


# Servers that go away, and come back.


def restarted(server: DurableServer, act: Callable[[], Sequence[Any]]) -> Sequence[Any]:
    """Return what ``act`` does while the server is restarted, having seen that it began before."""
    found: list[Any] = []
    with redis.Redis.from_url(server.address) as client:
        thread = threading.Thread(target=lambda: found.extend(act()))
        respond(client, "a")
        thread.start()
        wait_until(lambda: client.xlen(OUT) == 0)
    server.stop()
    server.start()
    with redis.Redis.from_url(server.address) as client:
        respond(client, "b")
        thread.join(30)
        assert not thread.is_alive()
    return found


@pytest.mark.parametrize("kind", READERS)
def test_a_server_that_restarts_is_waited_for(tmp_path: Path, kind: str) -> None:
    server = DurableServer(tmp_path)
    server.start()

    def read_two() -> list[Any]:
        with READERS[kind](S, timeout_s=30, options=Settings(broker_url=server.address)) as reader:
            return [ids_of(response) for response in islice(reader, 2)]

    try:
        assert restarted(server, read_two) == [("a",), ("b",)]
    finally:
        server.stop()


@pytest.mark.parametrize("kind", READERS)
def test_a_server_that_does_not_come_back_is_an_error_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(connections, "RETRIES", 1)
    server = DurableServer(tmp_path)
    server.start()
    reader = READERS[kind](S, timeout_s=QUIET_S, options=Settings(broker_url=server.address))
    server.stop()
    with pytest.raises(redis.ConnectionError), reader:
        next(iter(reader))


def test_a_stream_that_is_deleted_while_it_is_read_begins_anew(
    client: redis.Redis, open_reader: Open
) -> None:
    seen: list[Any] = []

    def run() -> None:
        with open_reader(timeout_s=20) as reader:
            for response in reader:
                seen.append(ids_of(response))
                if len(seen) == 2:
                    return

    respond(client, "a")
    thread = threading.Thread(target=run)
    thread.start()
    wait_until(lambda: seen and not left(client))
    client.delete(OUT)
    respond(client, "b")
    thread.join(20)
    assert seen == [("a",), ("b",)]


def test_a_full_server_is_read(client: redis.Redis, read: Read) -> None:
    for number in range(FETCH + 2):
        respond(client, f"{number}")
    assert read(1) == [("0",)]
    with full_memory(client):
        assert len(read(claim_s=1000)) == FETCH + 1
    assert left(client) == 0


def test_a_full_server_is_waited_for_where_nobody_ever_read(client: redis.Redis, read: Read) -> None:
    respond(client, "a")
    with full_memory(client):
        with pytest.raises(redis.OutOfMemoryError):
            read()
        threading.Timer(0.1, client.config_set, ["maxmemory", "0"]).start()
        assert read(1, timeout_s=20) == [("a",)]
