"""What a channel sends to take messages, and how it takes the answers; the test plays the server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import given
from hypothesis import settings as laws
from hypothesis import strategies as st
from redis.exceptions import NoScriptError, OutOfMemoryError

from sutra_tasks.broker.queues import lane, lanes
from sutra_tasks.broker.take_protocol import (
    BACKWARDS_EVERY,
    IDLE_WAIT_S,
    MOST_BYTES,
    MOST_MESSAGES,
    REFUSED_PAUSE_S,
    Taken,
    TakeProtocol,
)

if TYPE_CHECKING:
    from sutra_tasks.broker.in_flight import InFlightMessages

FULL = OutOfMemoryError("full")


class InFlight:
    """The messages in flight, as far as the protocol looks at them: notes are numbers."""

    key = "in-flight"

    def __init__(self) -> None:
        self.pending: list[int] = []
        self.sent: list[int] = []
        self.refused: set[str] = set()

    @property
    def has_pending(self) -> bool:
        return bool(self.pending)

    def may_take(self, queue: str) -> bool:
        return queue not in self.refused

    def take_command(self, sources: Any, **options: Any) -> tuple[Any, ...]:
        assert not self.sent, "the last command has no answer yet"
        self.sent, self.pending = self.pending, []
        assert options.pop("most_bytes") == MOST_BYTES
        text = options.pop("with_text")
        return (
            "TEXT" if text else "TAKE",
            tuple(sources),
            options.pop("most_messages"),
            tuple(self.sent),
        )

    def take_answered(self) -> None:
        self.sent = []

    def take_lost(self) -> None:
        self.pending, self.sent = self.sent + self.pending, []


class Channel:
    """A protocol with its clock."""

    def __init__(self, *queues: str) -> None:
        self.in_flight = InFlight()
        self.protocol = TakeProtocol(cast("InFlightMessages", self.in_flight))
        self.queues = queues or ("q",)
        self.now = 1000.0

    def commands(self, most: int | None = None) -> list[tuple[Any, ...]]:
        return self.protocol.commands(self.queues, most_messages=most, now=self.now)

    def answer(self, *messages: tuple[str, bytes]) -> list[Taken]:
        """Answer the script."""
        flat = [item for source, raw in messages for item in (source.encode(), raw)]
        return self.protocol.answered(flat, self.now)

    def look_at_empty_queues(self) -> None:
        self.commands()
        assert self.answer() == []


def take(
    *notes: int, sources: tuple[str, ...] = lanes("q"), most: int = MOST_MESSAGES, word: str = "TAKE"
) -> tuple[Any, ...]:
    return (word, sources, most, notes)


WAIT = ("BLMOVE", "q", "in-flight", "RIGHT", "LEFT", IDLE_WAIT_S)


def test_all_queues_are_looked_into_by_priority() -> None:
    channel = Channel("a", "b")
    [(_, sources, _, _)] = channel.commands()
    assert sources == tuple(name for at in range(4) for name in (lanes("a")[at], lanes("b")[at]))


def test_messages_come_with_their_queue() -> None:
    channel = Channel("a", "b")
    channel.commands()
    found = channel.answer((lane("b", 6), b"1"), ("a", b"2"))
    assert found == [Taken("b", b"1"), Taken("a", b"2")]
    assert not channel.protocol.awaits_answer


@pytest.mark.parametrize(("most", "expected"), [(None, MOST_MESSAGES), (3, 3), (1000, MOST_MESSAGES)])
def test_no_more_is_taken_than_the_channel_may_have(most: int | None, expected: int) -> None:
    assert Channel().commands(most) == [take(most=expected)]


def test_while_messages_come_no_command_waits() -> None:
    channel = Channel()
    for _ in range(3):
        assert channel.commands() == [take()]
        assert not channel.protocol.waits
        channel.answer(("q", b"1"))


def test_empty_queues_are_waited_on_and_looked_into_again_when_the_wait_is_over() -> None:
    channel = Channel()
    channel.look_at_empty_queues()
    assert channel.commands() == [WAIT]
    assert channel.protocol.waits
    assert channel.protocol.answered(None, channel.now) == []
    assert channel.commands() == [take()]


def test_a_message_ends_the_wait_and_the_next_is_waited_for_but_not_for_ever() -> None:
    channel = Channel()
    channel.look_at_empty_queues()
    for turn in range(3):
        assert channel.commands() == [WAIT], turn
        channel.now += IDLE_WAIT_S / 4
        assert channel.protocol.answered(b"1", channel.now) == [Taken("q", b"1")]
    channel.commands()
    channel.now += IDLE_WAIT_S
    channel.protocol.answered(b"1", channel.now)
    assert channel.commands() == [take()]  # the other lists have their turn


def test_an_idle_worker_sends_what_is_pending_before_it_waits() -> None:
    channel = Channel()
    channel.look_at_empty_queues()
    channel.in_flight.pending = [1, 2]
    assert channel.commands() == [take(1, 2, most=MOST_MESSAGES - 1), WAIT]
    assert channel.answer(("q", b"1")) == [Taken("q", b"1")]
    assert channel.protocol.awaits_answer
    assert channel.protocol.answered(b"2", channel.now) == [Taken("q", b"2")]
    assert not channel.protocol.awaits_answer


def test_a_channel_that_may_have_one_message_takes_or_waits_but_not_both() -> None:
    channel = Channel()
    channel.look_at_empty_queues()
    channel.in_flight.pending = [1]
    assert channel.commands(1) == [take(1, most=1)]
    channel.answer()
    assert channel.commands(1) == [WAIT]


def test_one_take_in_some_begins_with_the_last_priority() -> None:
    channel = Channel()
    backwards = []
    for turn in range(1, 3 * BACKWARDS_EVERY + 1):
        [(_, sources, _, _)] = channel.commands()
        assert sources in (lanes("q"), lanes("q")[::-1])
        backwards += [turn] * (sources != lanes("q"))
        channel.answer(("q", b"1"))
    assert backwards == [BACKWARDS_EVERY, 2 * BACKWARDS_EVERY, 3 * BACKWARDS_EVERY]


def test_from_a_queue_that_may_not_be_taken_from_nothing_is_taken() -> None:
    channel = Channel("a", "b")
    channel.in_flight.refused = {"a"}
    assert channel.commands() == [take(sources=lanes("b"))]


def test_without_a_queue_to_take_from_only_what_is_pending_is_sent() -> None:
    channel = Channel()
    channel.in_flight.refused = {"q"}
    assert channel.commands() == []
    assert not channel.protocol.awaits_answer
    channel.in_flight.pending = [1]
    assert channel.commands() == [take(1, sources=(), most=0)]
    channel.answer()
    channel.in_flight.refused = set()
    assert channel.commands() == [take()]  # that nothing came says nothing of the queues


def test_after_a_refusal_there_is_a_pause_and_what_was_sent_is_sent_again() -> None:
    channel = Channel()
    channel.in_flight.pending = [1]
    channel.commands()
    channel.in_flight.pending = [2]  # meanwhile
    assert channel.protocol.refused(FULL, channel.now) == REFUSED_PAUSE_S
    assert channel.commands() == []
    channel.now += REFUSED_PAUSE_S
    assert channel.commands() == [take(1, 2)]


def test_a_wait_that_is_refused_sends_nothing_again() -> None:
    channel = Channel()
    channel.look_at_empty_queues()
    channel.in_flight.pending = [1]
    channel.commands()
    channel.answer()
    assert channel.protocol.refused(FULL, channel.now) == REFUSED_PAUSE_S
    channel.now += REFUSED_PAUSE_S
    assert channel.commands() == [take()]


def test_a_server_without_the_script_gets_it_at_once_and_only_then() -> None:
    channel = Channel()
    channel.in_flight.pending = [1]
    channel.commands()
    assert channel.protocol.refused(NoScriptError(), channel.now) == 0.0
    assert channel.commands() == [take(1, word="TEXT")]
    channel.answer(("q", b"1"))
    assert channel.commands() == [take()]


def test_a_script_that_is_missing_before_a_wait_is_sent_when_the_wait_is_answered() -> None:
    channel = Channel()
    channel.look_at_empty_queues()
    channel.in_flight.pending = [1]
    channel.commands()
    channel.protocol.refused(NoScriptError(), channel.now)
    assert channel.protocol.waits
    assert channel.protocol.answered(b"1", channel.now) == [Taken("q", b"1")]
    channel.now += IDLE_WAIT_S
    [first, *_] = channel.commands()
    assert first[0] == "TEXT"
    assert first[-1] == (1,)


def test_after_a_lost_connection_nothing_is_awaited_and_all_is_sent_again() -> None:
    channel = Channel()
    channel.look_at_empty_queues()
    channel.in_flight.pending = [1]
    channel.commands()
    channel.protocol.connection_lost()
    assert not channel.protocol.awaits_answer
    assert not channel.protocol.waits
    assert channel.commands()[0][-1] == (1,)


EVENTS = st.sampled_from(["answer", "empty", "full", "no script", "lost", "note", "note"])


@laws(max_examples=60, deadline=None)
@given(events=st.lists(EVENTS, max_size=30), most=st.integers(1, 20))
def test_whatever_is_answered_each_note_is_sent_until_the_server_has_it(
    events: list[str], most: int
) -> None:
    channel, noted, done = Channel(), 0, set[int]()
    for event in events:
        if event == "note":
            channel.in_flight.pending.append(noted)
            noted += 1
            continue
        channel.now += REFUSED_PAUSE_S
        commands = channel.commands(most)
        assert sum(1 if name == "BLMOVE" else rest[1] for name, *rest in commands) <= most
        if event == "lost":
            channel.protocol.connection_lost()
            continue
        for name, *rest in commands:
            if event in ("full", "no script"):
                channel.protocol.refused(FULL if event == "full" else NoScriptError(), channel.now)
            elif name == "BLMOVE":
                channel.protocol.answered(None if event == "empty" else b"1", channel.now)
            else:
                assert not done & set(rest[-1]), "sent again although it was answered"
                done |= set(rest[-1])
                channel.answer(*[] if event == "empty" else [("q", b"1")])
        assert not channel.protocol.awaits_answer
    assert done | set(channel.in_flight.pending) == set(range(noted))
