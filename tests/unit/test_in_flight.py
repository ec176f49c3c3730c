"""Held messages, as far as no server is needed: what is had, and what is said again."""

import pytest

from sutra_tasks import keys
from sutra_tasks.broker.in_flight import SETTLE_AND_TAKE, HeldMessages
from sutra_tasks.broker.queues import MOST_CREDIT, lane, new_incarnation


def test_what_no_answer_came_to_is_told_again_once_in_order() -> None:
    held = HeldMessages("gpu0.1")
    key, own = keys.held("gpu0.1"), keys.load("gpu0")
    first, second = "sutra.device.a", lane("sutra.device.b", 9)
    held.delivered(b"1", "q", tokens=7, weight=7)
    held.finish(b"1")
    held.finish(b"2")
    held.forward(b"3", "sutra.device.a", 0, load="load:a", weight=3)
    held.take_command(["q"], room=1, most_bytes=9)
    held.finish(b"4")  # while the answer is awaited
    held.forward(b"5", "sutra.device.b", 9, load="load:b", weight=0)
    held.not_told()
    held.not_told()

    assert held.take_command(["q"], room=1, most_bytes=9) == (
        "EVAL", SETTLE_AND_TAKE,
        7, key, own, first, "load:a", second, "load:b", "q",
        3, 2, 1, 9,
        b"1", 7, b"2", 0, b"4", 0, b"3", 3, b"5", 0,
    )  # fmt: skip
    held.told()
    held.not_told()
    assert not held.has_news
    _, _, *command = held.take_command(["q", "r"], room=0, most_bytes=9)
    assert command == [4, key, own, "q", "r", 0, 0, 0, 9]


def test_a_process_takes_whatever_comes_until_it_is_told_otherwise() -> None:
    assert HeldMessages(new_incarnation("gpu0")).may_take("q")


def test_a_message_uses_credit_while_a_consumer_has_it_and_only_so_much() -> None:
    held = HeldMessages("gpu0.1")
    held.delivered(b"small", "q", tokens=10, weight=10)
    held.delivered(b"large", "q", tokens=100_000, weight=100_000)
    held.delivered(b"past the router", "q", tokens=5, weight=0)
    assert held.credit == 10 + MOST_CREDIT + 5
    held.finish(b"large")
    assert held.credit == 15
    held.abandon(b"small")
    held.forward(b"past the router", "q", 0, load="load", weight=0)
    assert held.credit == 0


def test_only_what_came_past_the_router_is_uncounted() -> None:
    held = HeldMessages("gpu0.1")
    assert held.uncounted == (0, 0)
    held.delivered(b"1", "q", tokens=10, weight=10)
    held.delivered(b"2", "q", tokens=5, weight=0)
    held.delivered(b"3", "q", tokens=6, weight=0)
    assert held.uncounted == (2, 11)
    held.finish(b"2")
    assert held.uncounted == (1, 6)


@pytest.mark.parametrize("device", ["gpu0", None])
def test_only_a_device_takes_off_its_load_what_it_finishes(device: str | None) -> None:
    held = HeldMessages(new_incarnation(device))
    held.delivered(b"1", "q", tokens=10, weight=10)
    held.finish(b"1")
    *_, raw, weight = held.take_command((), room=0, most_bytes=0)
    assert (raw, weight) == (b"1", 10 if device else 0)
