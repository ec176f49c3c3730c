"""Whether a message is forwarded, waits or fails."""

import pytest
from hypothesis import given
from hypothesis import settings as laws
from hypothesis import strategies as st

from sutra_tasks.broker.load import MOST_CREDIT
from sutra_tasks.client.call import Demand
from sutra_tasks.errors import InvalidOptionError, NoHealthyWorkersError
from sutra_tasks.routing.decision import decide, waited_s
from sutra_tasks.routing.snapshot import Device, Fleet
from sutra_tasks.settings import Settings

NOW = 1000.0
PATIENCE_S = 30.0
NOBODY = Fleet((), 3, 99.0)
FREE = Device("free", "q", credit_tokens=1000)
BUSY = Device("busy", "q", credit_tokens=1000, credit_used=1000)


def demand(tokens: int = 100, *, sent_at: float | None = None, strategy: str | None = None) -> Demand:
    return Demand(texts=0, bytes=4 * tokens, sent_at=sent_at, strategy=strategy)


def decision(
    wanted: Demand,
    fleet: Fleet,
    *,
    seen_at: float = NOW,
    outage_s: float = 0.0,
    has_waited: bool = False,
) -> Device | None:
    return decide(
        wanted,
        fleet,
        ticket=0,
        seen_at=seen_at,
        now=NOW,
        outage_s=outage_s,
        has_waited=has_waited,
        options=Settings(strategy="least_loaded", no_device_wait_s=PATIENCE_S),
    )


@pytest.mark.parametrize(
    ("sent_at", "seen_at", "now", "expected"),
    [
        (None, 100, 103, 3),
        (90, 100, 103, 13),
        (100, 100, 100, 0),
        (200, 100, 103, 3),  # the sender's clock runs ahead
        (None, 100, 90, 0),
    ],
)
def test_a_wait_begins_when_the_message_was_sent(
    sent_at: float | None, seen_at: float, now: float, expected: float
) -> None:
    demand = Demand(texts=1, bytes=1, sent_at=sent_at, strategy=None)
    assert waited_s(demand, seen_at=seen_at, now=now) == expected


@pytest.mark.parametrize(
    ("devices", "tokens", "has_waited", "expected"),
    [
        ([FREE], 100, False, FREE),
        ([BUSY, FREE], 100, False, FREE),
        ([FREE], MOST_CREDIT + 1, False, FREE),
        ([FREE], 100, True, FREE),
        ([BUSY], MOST_CREDIT, False, BUSY),  # it was taken while there was credit
        ([BUSY], MOST_CREDIT + 1, False, None),
        ([BUSY], 100, True, None),
        ([BUSY], MOST_CREDIT + 1, True, None),
    ],
)
def test_small_messages_are_forwarded_at_once_and_others_wait_for_credit(
    devices: list[Device], tokens: int, has_waited: bool, expected: Device | None
) -> None:
    assert decision(demand(tokens), Fleet(tuple(devices)), has_waited=has_waited) == expected


@laws(max_examples=50, deadline=None)
@given(
    outage_s=st.floats(0, 100),
    seen_s=st.floats(0, 100),
    sent_s=st.none() | st.floats(-100, 100),
    has_waited=st.booleans(),
)
def test_without_a_live_device_a_message_fails_once_it_and_the_outage_are_old_enough(
    outage_s: float, seen_s: float, sent_s: float | None, has_waited: bool
) -> None:
    seen_at = NOW - seen_s
    wanted = demand(sent_at=None if sent_s is None else NOW - sent_s)
    waiting_s = waited_s(wanted, seen_at=seen_at, now=NOW)
    if min(outage_s, waiting_s) < PATIENCE_S:
        assert (
            decision(wanted, NOBODY, seen_at=seen_at, outage_s=outage_s, has_waited=has_waited) is None
        )
        return
    with pytest.raises(NoHealthyWorkersError) as failed:
        decision(wanted, NOBODY, seen_at=seen_at, outage_s=outage_s, has_waited=has_waited)
    error = failed.value
    assert (error.known, error.oldest_heartbeat_s) == (3, 99.0)
    assert error.waited_s == round(waiting_s, 1)


@pytest.mark.parametrize("fleet", [NOBODY, Fleet((FREE,)), Fleet((BUSY,))])
@pytest.mark.parametrize("has_waited", [True, False])
def test_a_message_with_an_unknown_strategy_fails_whatever_the_fleet(
    fleet: Fleet, has_waited: bool
) -> None:
    with pytest.raises(InvalidOptionError):
        decision(demand(MOST_CREDIT + 1, strategy="fastest"), fleet, has_waited=has_waited)
