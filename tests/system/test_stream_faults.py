"""Streams whose devices die, stand still or fail, or whose server restarts: all comes out, and once."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest

from sutra_tasks.health.states import DeviceState
from sutra_tasks.settings import Settings
from sutra_tasks.streaming.client.producer import StreamProducer
from sutra_tasks.streaming.consumer.shared_state import BROKEN_S
from tests.conftest import wait_until
from tests.system.conftest import BRISK, streamed
from tests.system.local_fleet import LocalFleet, frozen, local_fleet
from tests.system.streams import STREAMED, Stream, chunks_of

SLOW = STREAMED | {"simulated_fixed_s": 0.02, "batch_texts": 32}
SLOWER = STREAMED | {"simulated_fixed_s": 0.06}
"""So that a device can be caught with a text."""
NEVER_S = 600.0
"""So long nobody waits in a test: what is handed over at once need not be."""

TEXT = " ".join(f"word{n}" for n in range(3000))
PIECES = [TEXT[at : at + 100].encode() for at in range(0, len(TEXT), 100)]
KEYS = [f"key {n}" for n in range(12)]


@pytest.fixture
def faults(tmp_path):
    folder = tmp_path / "faults"
    folder.mkdir()
    return folder


@contextmanager
def seized(fleet: LocalFleet, stream: Stream, victim: str) -> Iterator[None]:
    """Add to the stream, and freeze a device that has entries and a text which no other has had."""
    pid, incarnation = fleet.pid(victim), fleet.incarnation(victim)

    def has_some() -> bool:
        taken = any(stream.client.hexists(stream.key(f"text:{key}"), "token") for key in KEYS)
        return taken and bool(stream.pending(incarnation))

    with ExitStack() as others, ExitStack() as its_own:
        others.enter_context(frozen(*(fleet.pid(one) for one in fleet.device_ids if one != victim)))
        for number, key in enumerate(KEYS):  # by turns, so that it has both at once
            stream.add(f"text {number} {n}" for n in range(32))
            stream.write(key, *PIECES[: len(PIECES) // 2], end=False)
        while True:
            wait_until(has_some)
            its_own.enter_context(frozen(pid))
            if has_some():
                break
            its_own.close()
        others.close()
        yield


def check(stream: Stream) -> None:
    """See all come out once, when the rest of the texts is added."""
    for key in KEYS:
        stream.write(key, *PIECES[len(PIECES) // 2 :])
    stream.check()
    for key in KEYS:
        stream.check_text(key, TEXT, chunks_of(TEXT))
    wait_until(lambda: not stream.pending())
    stream.look()
    assert stream.repeats() == 0
    assert stream.errors == {}
    assert stream.size("dead") == 0


def test_a_killed_device_loses_and_doubles_nothing(start_fleet, stream):
    with start_fleet(3, **SLOWER) as fleet:
        victim = fleet.device_ids[0]
        pid = fleet.pid(victim)
        with seized(fleet, stream, victim):
            os.kill(pid, signal.SIGKILL)
        check(stream)
        fleet.await_replacement(victim, pid)


def test_a_device_that_stops_hands_over_what_it_has_not_begun(start_fleet, stream):
    options = SLOWER | {"stream_claim_s": NEVER_S}
    with start_fleet(2, **options) as fleet:
        victim = fleet.device_ids[0]
        pid = fleet.pid(victim)
        with seized(fleet, stream, victim):
            os.kill(pid, signal.SIGTERM)  # it hears that when it goes on
        check(stream)
        fleet.await_replacement(victim, pid)
        assert all("status 0;" in report for report in fleet.reports)


def test_what_a_device_commits_late_is_not_written_twice(start_fleet, stream):
    options = SLOWER | {"device_ttl_s": 30.0, "lease_s": 30.0}  # or it would end before it commits
    with start_fleet(2, **options) as fleet:
        victim = fleet.device_ids[0]
        with seized(fleet, stream, victim):
            check(stream)
            before = stream.devices.keys()
        while victim not in {stream.devices[name] for name in stream.devices.keys() - before}:
            before = stream.devices.keys()  # what it had comes before what it takes now
            stream.add(f"more {n}" for n in range(50))
            stream.check()
        assert stream.repeats() == 0
        assert fleet.reports == []


def test_entries_that_end_their_process_become_dead_letters_and_nothing_else_does(
    start_fleet, stream, faults
):
    with start_fleet(2, faults=faults, max_attempts=2, **STREAMED) as fleet:
        stream.add(f"before {n}" for n in range(100))
        stream.add(["!die of this"])
        (deadly,) = list(stream.sent)[-1:]
        stream.add(f"after {n}" for n in range(100))
        stream.check(wrong={deadly})
        deaths = [line for line in fleet.reports if "signal 9" in line]
        assert len(deaths) == fleet.options.max_attempts
    assert stream.errors[deadly].error == "PoisonMessageError"
    ((_, letter),) = stream.client.xrange(stream.key("dead"))
    assert (letter[b"id"], letter[b"text"]) == (deadly.encode(), b"!die of this")
    assert stream.repeats() == 0


def test_a_stretch_of_a_text_that_ends_its_process_is_given_up_and_nothing_else_is(
    start_fleet, stream, faults
):
    with start_fleet(2, faults=faults, max_attempts=2, **STREAMED) as fleet:
        with frozen(*map(fleet.pid, fleet.device_ids)):
            for key in KEYS:
                words = "!die of this " if key == "key 5" else f"harmless {key} "
                stream.write(key, words.encode(), end=False)
            for key in KEYS:
                stream.write(key, b"to its end")
        stream.await_that(lambda: stream.errors and len(stream.written) == len(KEYS) - 1)
        assert len([line for line in fleet.reports if "signal 9" in line]) == fleet.options.max_attempts
        stream.write("key 5", b"and the next text of that key")
        stream.await_that(lambda: stream.of_text("key 5"))
    assert {chunk.key for chunk, _ in stream.written} == set(KEYS)
    assert {error.error for error in stream.errors.values()} == {"PoisonMessageError"}
    ((_, letter),) = stream.client.xrange(stream.key("dead"))
    assert (letter[b"key"], letter[b"text"]) == (b"key 5", b"!die of this to its end")
    assert stream.repeats() == 0


def test_a_text_on_which_the_engine_raises_fails_alone(start_fleet, stream, faults):
    with start_fleet(1, faults=faults, **STREAMED):
        stream.add(f"before {n}" for n in range(50))
        stream.add(["!raise of this"])
        (wrong,) = list(stream.sent)[-1:]
        stream.write("text", b"!raise in pieces")
        stream.add(f"after {n}" for n in range(50))
        stream.await_that(lambda: len(stream.errors) == 2)
        (piece,) = stream.errors.keys() - {wrong}
        stream.check(wrong={wrong, piece})
    assert {error.error for error in stream.errors.values()} == {"EncodingError"}
    assert "of this" not in stream.errors[wrong].message
    assert piece.startswith("text@")
    assert stream.size("dead") == 0


def test_a_device_that_begins_to_give_no_numbers_takes_no_entries(start_fleet, stream, faults):
    with start_fleet(2, faults=faults, **SLOW) as fleet:
        stream.add(f"before {n}" for n in range(300))
        stream.add(["!once-nan it goes wrong here"])
        stream.add(f"after {n}" for n in range(1000))
        stream.check()
        wait_until(lambda: DeviceState.UNHEALTHY in {device.state for device in fleet.status().devices})
        broken = next(one for one in fleet.status().devices if one.state is DeviceState.UNHEALTHY)
        before = broken.record.batches
        ends_at = time.monotonic() + 1.5 * BROKEN_S  # by then it would have begun again
        while time.monotonic() < ends_at:
            stream.add(f"then {n}" for n in range(100))
            stream.check()
        assert fleet.device(broken.id).record.batches <= before + 1
    assert stream.size("dead") == 0


@pytest.mark.parametrize("how", ["in order", "killed"])
def test_the_server_restarts(durable, tmp_path, how):
    server, client = durable
    options = replace(Settings(broker_url=server.address), **(BRISK | SLOW))
    with (
        streamed(client) as stream,
        local_fleet(options, client, tmp_path, devices=2) as fleet,
        StreamProducer(stream.name, options=options) as producer,
    ):
        stream.add(f"text {n}" for n in range(2000))
        stream.write("text", TEXT[:8000].encode(), end=False)
        wait_until(stream.pending)
        if how == "killed":
            server.kill(client)
        else:
            server.stop()
        server.start()
        for n in range(200):
            stream.sent[producer.send(f"more {n}")] = f"more {n}"
        stream.write("text", TEXT[8000:].encode())
        stream.check()
        stream.check_text("text", TEXT, chunks_of(TEXT))
        assert stream.repeats() == 0
        assert fleet.reports == []


def test_a_full_server_is_worked_empty(start_fleet, stream, client):
    with start_fleet(2, **SLOW):
        stream.add(f"text {n}" for n in range(3000))
        client.config_set("maxmemory", "1")
        try:
            stream.check()
        finally:
            client.config_set("maxmemory", "0")
    assert stream.repeats() == 0
