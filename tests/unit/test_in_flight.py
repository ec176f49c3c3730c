"""Messages in flight, as far as no server is needed: which are delivered, and what is sent again."""

from typing import Any

import pytest

from sutra_tasks import keys
from sutra_tasks.broker import in_flight as module
from sutra_tasks.broker.in_flight import InFlightMessages
from sutra_tasks.broker.load import MOST_CREDIT
from sutra_tasks.broker.queues import lane, new_incarnation


class Script:
    """A script whose command is the values it was given."""

    def command(self, **values: Any) -> tuple[Any, ...]:
        return ("hash", values)

    def command_with_text(self, **values: Any) -> tuple[Any, ...]:
        return ("text", values)


@pytest.fixture(autouse=True)
def _script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TAKE", Script())


def test_what_no_answer_came_to_is_sent_again_once_in_order() -> None:
    messages = InFlightMessages("gpu0.1")
    messages.delivered(b"1", "q", tokens=7, weight=7)
    messages.acknowledge(b"1")
    messages.acknowledge(b"2")
    messages.forward(b"3", "a", 0, weight=3)
    messages.take_command(["q"], most_messages=1, most_bytes=9)
    messages.acknowledge(b"4")  # while the answer is awaited
    messages.forward(b"5", "b", 9, weight=0)
    messages.take_lost()
    messages.take_lost()

    expected: dict[str, Any] = {
        "in_flight": keys.in_flight("gpu0.1"),
        "load": keys.load("gpu0"),
        "targets": [keys.device_queue("a"), lane(keys.device_queue("b"), 9)],
        "target_loads": [keys.load("a"), keys.load("b")],
        "sources": ["q"],
        "most_messages": 1,
        "most_bytes": 9,
        "acknowledged": [b"1", b"2", b"4"],
        "acknowledged_weights": [7, 0, 0],
        "forwarded": [b"3", b"5"],
        "forwarded_weights": [3, 0],
    }
    found = messages.take_command(["q"], most_messages=1, most_bytes=9, with_text=True)
    assert found == ("text", expected)
    messages.take_answered()
    messages.take_lost()
    assert not messages.has_pending
    lists = ("targets", "target_loads", "forwarded", "acknowledged")
    nothing: dict[str, Any] = {name: [] for name in (*lists, *(f"{one}_weights" for one in lists[2:]))}
    found = messages.take_command(["q", "r"], most_messages=0, most_bytes=9)
    assert found == ("hash", expected | nothing | {"sources": ["q", "r"], "most_messages": 0})


def test_a_process_takes_whatever_comes_until_it_is_told_otherwise() -> None:
    assert InFlightMessages(new_incarnation("gpu0")).may_take("q")


def test_a_message_uses_credit_while_a_consumer_has_it_and_only_so_much() -> None:
    messages = InFlightMessages("gpu0.1")
    messages.delivered(b"small", "q", tokens=10, weight=10)
    messages.delivered(b"large", "q", tokens=100_000, weight=100_000)
    messages.delivered(b"past the router", "q", tokens=5, weight=0)
    assert messages.credit_used == 10 + MOST_CREDIT + 5
    messages.acknowledge(b"large")
    assert messages.credit_used == 15
    messages.consumer_gone(b"small")
    messages.forward(b"past the router", "a", 0, weight=0)
    assert messages.credit_used == 0


def test_only_what_came_past_the_router_is_uncounted() -> None:
    messages = InFlightMessages("gpu0.1")
    assert messages.uncounted == (0, 0)
    messages.delivered(b"1", "q", tokens=10, weight=10)
    messages.delivered(b"2", "q", tokens=5, weight=0)
    messages.delivered(b"3", "q", tokens=6, weight=0)
    assert messages.uncounted == (2, 11)
    messages.acknowledge(b"2")
    assert messages.uncounted == (1, 6)


@pytest.mark.parametrize("device", ["gpu0", None])
def test_only_a_device_takes_off_its_load_what_it_acknowledges(device: str | None) -> None:
    messages = InFlightMessages(new_incarnation(device))
    messages.delivered(b"1", "q", tokens=10, weight=10)
    messages.acknowledge(b"1")
    _, values = messages.take_command((), most_messages=0, most_bytes=0)
    assert values["acknowledged"] == [b"1"]
    assert values["acknowledged_weights"] == [10 if device else 0]
