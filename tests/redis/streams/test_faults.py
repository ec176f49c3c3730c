"""One stream with a fault, on a real server: it is named, it loses nothing, and no other one waits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import redis

from sutra_tasks import keys
from sutra_tasks.connections import broker_client
from sutra_tasks.engines.simulated_engine import SimulatedEncoder
from sutra_tasks.settings import Settings
from sutra_tasks.streaming.consumer import faults, intake, pacing, upkeep
from sutra_tasks.streaming.responses import StreamingError, parse_output
from sutra_tasks.streaming.status import stream_status
from tests.conftest import wait_until
from tests.redis.streams.peers import (
    DEAD,
    ERROR,
    IN,
    OUT,
    RESPONSE,
    TAKEABLE,
    TEXTS,
    Device,
    S,
    add,
    cut,
    pending,
    read,
    take,
    take_one,
    written,
)
from tests.unit.fake_streams import consuming

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sutra_tasks.engines.encoder import TokenizedText
    from sutra_tasks.streaming.consumer.consumer import StreamConsumer
    from sutra_tasks.vectors import Floats

BAD, GOOD = "bad", "good"


@pytest.fixture(autouse=True)
def _brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(faults, "MOST_PAUSE_S", 0.2)
    monkeypatch.setattr(pacing, "IDLE_S", 0.02)
    monkeypatch.setattr(intake, "NAMES_S", 0.05)
    monkeypatch.setattr(upkeep, "UPKEEP_S", 0.05)
    monkeypatch.setattr(upkeep, "REPORT_S", 0.05)


@pytest.fixture(autouse=True)
def _no_streams(_swept: None, client: redis.Redis) -> Iterator[None]:
    client.flushdb()
    yield
    client.flushdb()


@contextmanager
def device(client: redis.Redis, encoder: SimulatedEncoder | None = None) -> Iterator[StreamConsumer]:
    with consuming(Device(client, "d"), encoder) as one:
        yield one


class Gated(SimulatedEncoder):
    """Computes only while its gate is open."""

    def __init__(self) -> None:
        super().__init__(width=4)
        self.gate = threading.Event()

    def encode(self, batch: Sequence[TokenizedText]) -> Floats:
        assert self.gate.wait(10)
        return super().encode(batch)


def send(client: redis.Redis, stream: str, *ids: str, **fields: str) -> None:
    client.sadd(keys.streams(), stream)
    for name in ids:
        entry: Any = {"id": name, "text": f"text {name}", **fields}
        client.xadd(keys.stream(stream, "in"), entry)


def answers(client: redis.Redis, stream: str) -> list[str]:
    """Return the ids that were answered, errors with the name of their class."""
    found: list[str] = []
    entries: Any = client.xrange(keys.stream(stream, "out"))
    for entry_id, fields in entries:
        said = parse_output(entry_id, fields)
        kind = f" {said.error}" if isinstance(said, StreamingError) else ""
        found += [f"{name}{kind}" for name in said.chunk_ids]
    return found


def faults_of(client: redis.Redis, stream: str) -> str:
    (status,) = stream_status(client, stream)
    return "\n".join(status.faults)


def put_list(client: redis.Redis, key: str) -> None:
    client.delete(key)
    client.lpush(key, "x")


# Each stream by itself.


@pytest.mark.parametrize("part", ["in", "out", "texts", "takeable", "buffered", "state", "upkeep"])
def test_a_stream_with_a_key_of_another_type_costs_no_other_anything_and_goes_on_when_it_is_gone(
    client: redis.Redis, part: str
) -> None:
    key = keys.stream(BAD, part)
    put_list(client, key)
    client.sadd(keys.streams(), BAD)
    send(client, GOOD, "1", "2")
    with device(client):
        wait_until(lambda: answers(client, GOOD) == ["1", "2"])
        wait_until(lambda: faults_of(client, BAD))
        assert f"{key} is a list" in faults_of(client, BAD)
        if part != "upkeep":  # another type is taken for the lease of another device
            wait_until(lambda: "WRONGTYPE" in faults_of(client, BAD))
        send(client, GOOD, "3", "4")
        wait_until(lambda: answers(client, GOOD) == ["1", "2", "3", "4"])
        assert faults_of(client, GOOD) == ""
        client.delete(key)
        send(client, BAD, "a", "b")
        wait_until(lambda: sorted(answers(client, BAD)) == ["a", "b"])
        wait_until(lambda: faults_of(client, BAD) == "")


def test_a_name_that_no_stream_can_have_is_passed_over_and_named(client: redis.Redis) -> None:
    client.sadd(keys.streams(), "no name", b"\xff", "a:b")
    send(client, GOOD, "1")
    with device(client):
        wait_until(lambda: answers(client, GOOD) == ["1"])
    assert all("no device reads" in faults_of(client, name) for name in ("no name", "\ufffd", "a:b"))
    assert not list(client.scan_iter("sutra:stream:a:b:*"))


def test_vectors_that_cannot_be_written_are_computed_again_when_they_can(client: redis.Redis) -> None:
    encoder, out = Gated(), keys.stream(BAD, "out")
    with device(client, encoder) as one:
        for stream in (BAD, GOOD):
            send(client, stream, "1", "2")
        send(client, BAD, "3", key="k", end="1")
        wait_until(lambda: one._shared.rows_in_flight >= 4)
        put_list(client, out)
        encoder.gate.set()
        wait_until(lambda: answers(client, GOOD) == ["1", "2"])
        wait_until(lambda: "commit: WRONGTYPE" in faults_of(client, BAD))
        send(client, GOOD, "4")
        wait_until(lambda: answers(client, GOOD) == ["1", "2", "4"])
        client.delete(out)
        wait_until(lambda: sorted(answers(client, BAD)) == ["1", "2", "k@3#0"])
        wait_until(lambda: faults_of(client, BAD) == "")
    assert client.exists(keys.stream(BAD, "dead")) == 0


@pytest.mark.parametrize("width", [300_000, 5_000_000], ids=["refused", "connection closed"])
def test_vectors_that_are_too_large_for_the_server_become_a_dead_letter(
    client: redis.Redis, url: str, width: int
) -> None:
    client.config_set("proto-max-bulk-len", 2**20)
    try:
        with (
            broker_client(Settings(broker_url=url), retries=False) as connected,
            device(connected, SimulatedEncoder(width=width)),
        ):
            send(client, BAD, "1")
            wait_until(lambda: answers(client, BAD) == ["1 StreamFaultError"])
    finally:
        client.config_set("proto-max-bulk-len", 2**29)
    (letter,) = written(client, keys.stream(BAD, "dead"))
    assert letter[b"text"] == b"text 1"


@contextmanager
def allowed(client: redis.Redis, url: str, *rules: str) -> Iterator[redis.Redis]:
    """Connect as a user who may do everything but what the rules of its ACL say."""
    server: Any = client
    server.execute_command("ACL", "SETUSER", "app", "reset", "on", ">pw", "~*", "&*", "+@all", *rules)
    try:
        with redis.Redis.from_url(url, username="app", password="pw") as limited:
            yield limited
    finally:
        server.execute_command("ACL", "DELUSER", "app")


def test_a_device_without_the_right_to_one_stream_serves_the_others(
    client: redis.Redis, url: str
) -> None:
    names = [keys.streams(), keys.stream_loads(), keys.stream_consumer("*"), keys.stream(GOOD, "*")]
    send(client, BAD, "1")
    send(client, GOOD, "1")
    rules = ["resetkeys", *(f"~{name}" for name in names)]
    with allowed(client, url, *rules) as limited, device(limited):
        wait_until(lambda: answers(client, GOOD) == ["1"])
        wait_until(lambda: "read: " in faults_of(client, BAD))
        assert "permission" in faults_of(client, BAD)


def test_reports_that_are_none_hide_no_status(client: redis.Redis) -> None:
    send(client, GOOD, "1")
    client.hset(keys.stream_loads(), mapping={"x": "garbage", b"\xff": "1 1"})
    client.hset(keys.stream(GOOD, "state"), mapping={"capacity": "many", "level": "high", "load": "x"})
    client.hset(keys.stream(GOOD, "totals"), mapping={b"\xff": "x", "accepted": "3"})
    for name, report in (("x", "no JSON"), ("\ufffd", '{"good": {"latency": {"a": 1}, "faults": [7]}}')):
        client.set(keys.stream_consumer(name), report)
    (status,) = stream_status(client)
    assert (status.size, status.capacity, status.totals["accepted"]) == (1, None, 3)
    with device(client):
        wait_until(lambda: answers(client, GOOD) == ["1"])
        wait_until(lambda: stream_status(client)[0].capacity is not None)
    put_list(client, keys.stream_loads())
    assert stream_status(client)[0].devices == 0
    with device(client):
        wait_until(lambda: stream_status(client)[0].devices)


# Within one stream.


@pytest.mark.parametrize(
    "damage",
    [
        lambda client: client.lset("sutra:stream:bad:pieces:k", 0, "no message pack"),
        lambda client: client.hset("sutra:stream:bad:text:k", "attempts", "many"),
        lambda client: put_list(client, "sutra:stream:bad:text:k"),
        lambda client: client.set("sutra:stream:bad:pieces:k", "x"),
    ],
    ids=["piece", "attempts", "text", "pieces"],
)
def test_a_damaged_text_costs_no_other_text_of_its_stream_anything(
    client: redis.Redis, damage: Callable[[redis.Redis], None]
) -> None:
    client.sadd(keys.streams(), BAD)
    one = Device(client, "before")
    add_piece(client, "k", "1")
    one.read(BAD, 10, first_need=8, most_unread=10)
    damage(client)
    with device(client):
        add_piece(client, "other", "2", end="1")
        wait_until(lambda: "other@2#0" in answers(client, BAD))
        add_piece(client, "k", "3", end="1")
        wait_until(
            lambda: (
                "3 InvalidTextError" in answers(client, BAD) or "open text k" in faults_of(client, BAD)
            )
        )
        add_piece(client, "other", "4", end="1")
        wait_until(lambda: "other@4#0" in answers(client, BAD))


def add_piece(client: redis.Redis, key: str, name: str, **fields: str) -> None:
    entry: Any = {"key": key, "id": name, "text": "a piece", **fields}
    client.xadd(keys.stream(BAD, "in"), entry)


def test_a_stream_that_was_deleted_is_not_made_again_by_a_device_that_reads_it(
    client: redis.Redis,
) -> None:
    one = Device(client, "d")
    send(client, S, "1")
    assert len(read(one)) == 1
    client.delete(keys.streams(), IN)
    assert read(one) == []
    assert one.claim(S, 0).entries == []
    assert client.exists(IN) == 0


# What the server refuses leaves no half state.


def test_a_commit_that_is_refused_leaves_the_entries(client: redis.Redis) -> None:
    one = listed(client)
    ids = [add(client, text=n) for n in range(3)]
    read(one)
    before = pending(client)
    put_list(client, OUT)
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        one.commit(S, RESPONSE, [(entry_id, '{"id":"x"}', b"x") for entry_id in ids])
    assert pending(client) == before
    assert client.xlen(IN) == 3
    client.delete(OUT)
    assert one.commit(S, RESPONSE, [(entry_id, '{"id":"x"}', b"x") for entry_id in ids]).entries == 3


@pytest.mark.parametrize("missing", ["xack", "xdel"])
def test_an_answer_whose_entry_may_not_be_removed_is_not_written(
    client: redis.Redis, url: str, missing: str
) -> None:
    add(client, text="x")
    (entry,) = read(listed(client))
    with allowed(client, url, f"-{missing}") as limited:
        one = Device(limited, "a")
        for refused in (
            lambda: one.commit(S, RESPONSE, [(entry[0], '{"id":"x"}', b"x")]),
            lambda: one.dead_letter(S, entry, ["reason", "died"], ERROR),
        ):
            with pytest.raises(redis.ResponseError, match="permission"):
                refused()
    assert (written(client), written(client, DEAD)) == ([], [])
    assert pending(client).keys() == {entry[0]}


@pytest.mark.parametrize("refusing", [OUT, DEAD])
def test_a_dead_letter_that_is_refused_leaves_the_entry(client: redis.Redis, refusing: str) -> None:
    one = listed(client)
    add(client, text="x")
    (entry,) = read(one)
    put_list(client, refusing)
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        one.dead_letter(S, entry, ["reason", "died"], ERROR)
    assert pending(client).keys() == {entry[0]}
    client.delete(refusing)
    assert (written(client), written(client, DEAD)) == ([], [])
    one.dead_letter(S, entry, ["reason", "died"], ERROR)
    assert (len(written(client)), len(written(client, DEAD)), client.xlen(IN)) == (1, 1, 0)


@pytest.mark.parametrize("refusing", [OUT, DEAD, "sutra:stream:s:pieces:k", "sutra:stream:s:buffered"])
def test_the_commit_of_a_text_that_is_refused_leaves_the_text(
    client: redis.Redis, refusing: str
) -> None:
    one = listed(client)
    add(client, text="12345678", key="k")
    read(one)
    text = take_one(one)
    stored: Any = client.get(refusing) if refusing.endswith("buffered") else None
    if refusing.endswith("pieces:k"):
        client.set(refusing, "x")
    else:
        put_list(client, refusing)
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        cut(one, text, letter=["reason", "died"])
    client.delete(refusing)
    if stored is not None:
        client.set(refusing, stored)
    assert (written(client), written(client, DEAD)) == ([], [])
    assert cut(one, text, letter=["reason", "died"]).entries == 1
    assert (len(written(client)), len(written(client, DEAD))) == (1, 1)


@pytest.mark.parametrize("refusing", [OUT, TEXTS, TAKEABLE])
def test_a_read_that_is_refused_takes_nothing(client: redis.Redis, refusing: str) -> None:
    one = listed(client)
    add(client, text="x")
    read(one, 1)
    add(client, text="12345678", key="k", end="1")
    put_list(client, refusing)
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        read(one)
    assert len(pending(client)) == 1
    client.delete(refusing)
    read(one)
    assert [text.buffer for text in take(one)] == [b"12345678"]


def listed(client: redis.Redis) -> Device:
    """Return a device, and have the stream in the list of streams."""
    client.sadd(keys.streams(), S)
    return Device(client, "a")
