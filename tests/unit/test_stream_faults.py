"""A stream with a fault is left alone for a growing while; what concerns all streams is passed on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import redis

from sutra_tasks.streaming.consumer.faults import FIRST_PAUSE_S, FORGET_S, MOST_PAUSE_S, StreamFaults

if TYPE_CHECKING:
    from collections.abc import Callable

REFUSED = redis.ResponseError("WRONGTYPE script: 1f, on @user_script:3.")


def fail(error: Exception) -> None:
    raise error


def guarded(faults: StreamFaults, now: float, do: Callable[[], object], stream: str = "s") -> None:
    with faults.guard(stream, "read", now):
        do()


@pytest.mark.parametrize("error", [REFUSED, redis.ResponseError("NOPERM"), ValueError("damaged")])
def test_an_error_of_one_stream_is_noted_and_pauses_what_failed_alone(error: Exception) -> None:
    faults = StreamFaults()
    guarded(faults, 100.0, lambda: fail(error))
    assert not faults.is_due("s", "read", now=100.0 + FIRST_PAUSE_S / 2)
    assert faults.is_due("s", "read", now=100.0 + FIRST_PAUSE_S)
    assert faults.is_due("s", "commit", now=100.0)
    assert faults.is_due("other", "read", now=100.0)
    words = "WRONGTYPE" if error is REFUSED else str(error)
    assert faults.reasons(100.0) == {"s": [f"read: {words}"]}


@pytest.mark.parametrize(
    "error",
    [
        redis.ConnectionError("away"),
        redis.AuthenticationError("WRONGPASS"),
        redis.OutOfMemoryError("full"),
        redis.ResponseError("MISCONF no disk"),
    ],
)
def test_an_error_of_the_whole_server_is_no_fault_of_a_stream(error: Exception) -> None:
    faults = StreamFaults()
    with pytest.raises(type(error)):
        guarded(faults, 100.0, lambda: fail(error))
    assert faults.is_due("s", "read", now=100.0)
    assert faults.reasons(100.0) == {}


def test_the_pause_grows_with_each_failure_in_a_row_and_ends_with_the_fault() -> None:
    faults, now = StreamFaults(), 100.0
    pauses = []
    for _ in range(8):
        guarded(faults, now, lambda: fail(REFUSED))
        before, now = (
            now,
            now
            + next(
                step / 100 for step in range(10_000) if faults.is_due("s", "read", now=now + step / 100)
            ),
        )
        pauses.append(now - before)
    assert pauses[0] == pytest.approx(FIRST_PAUSE_S, abs=0.02)
    assert pauses[1] == pytest.approx(2 * FIRST_PAUSE_S, abs=0.02)
    assert pauses[-1] == pytest.approx(MOST_PAUSE_S, abs=0.02)
    guarded(faults, now, lambda: None)
    assert faults.reasons(now) == {}
    guarded(faults, now, lambda: fail(REFUSED))
    assert faults.is_due("s", "read", now=now + FIRST_PAUSE_S)


def test_a_fault_of_a_deleted_stream_and_one_that_did_not_come_again_are_forgotten() -> None:
    faults = StreamFaults()
    for stream in ("deleted", "kept"):
        guarded(faults, 100.0, lambda: fail(REFUSED), stream)
    faults.keep_only(["kept"])
    assert faults.reasons(100.0).keys() == {"kept"}
    assert faults.reasons(100.0 + FIRST_PAUSE_S + FORGET_S + 1) == {}
    assert faults.is_due("kept", "read", now=100.0)
