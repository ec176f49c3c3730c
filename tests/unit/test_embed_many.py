"""``embed_many`` waits for a saturated fleet, and for a server that is down."""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from kombu.exceptions import OperationalError

from sutra_tasks import FleetSaturated, InvalidTextError, ServerUnavailableError, embed_many
from sutra_tasks.client import embed_many as bulk

TEXTS = list("abcdefgh")


@dataclass
class Fleet:
    """Stands for ``embed`` and the clock: takes ``room`` messages at a time, and logs what happens.

    Answers are of the space that is pinned, else of ``spaces`` in turn, the last one from then on.
    """

    room: float = float("inf")
    refusal: Exception = field(default_factory=lambda: FleetSaturated(1000, 0.5))
    opens_at: float = 0.0
    now: float = 0.0
    waiting: int = 0
    log: list[str] = field(default_factory=list)
    sleeps: list[float] = field(default_factory=list)
    server_error: Exception | None = None
    spaces: list[str] = field(default_factory=lambda: ["s:1"])
    pins: list[str | None] = field(default_factory=list)

    def apply_async(self, args: tuple[list[str]], options: Any, *, priority: int) -> "Result":
        assert priority > 0, "bulk goes behind single calls"
        (texts,) = args
        if self.waiting >= self.room or self.now < self.opens_at:
            self.log.append("refused")
            raise self.refusal
        self.waiting += 1
        self.log.append("".join(texts))
        self.pins.append(options["space"])
        served = self.spaces.pop(0) if len(self.spaces) > 1 else self.spaces[0]
        return Result(self, texts, options["space"] or served)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now += seconds


@dataclass
class Result:
    """The result of a call to the stand-in: the texts themselves are the vectors."""

    fleet: Fleet
    texts: list[str]
    space: str

    def get(self, **_: float | None) -> Any:
        self.fleet.waiting -= 1
        self.fleet.log.append("taken")
        return SimpleNamespace(vectors=self.texts, space=self.space, model="search@2")

    def forget(self) -> None:
        self.fleet.log.append("forgotten")
        if self.fleet.server_error:
            raise self.fleet.server_error

    revoke = forget


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Fleet]:
    def make(**options: Any) -> Fleet:
        fleet = Fleet(**options)
        monkeypatch.setattr(bulk, "embed", fleet)
        monkeypatch.setattr(bulk, "time", fleet)
        return fleet

    return make


@pytest.mark.parametrize(
    "refusal", [FleetSaturated(1000, 0.5), ServerUnavailableError("ConnectionError")]
)
def test_what_is_on_its_way_is_taken_before_a_refused_part_is_sent_again(
    start: Callable[..., Fleet], refusal: Exception
) -> None:
    fleet = start(room=2, refusal=refusal)
    assert list(embed_many(TEXTS, batch=2, in_flight=3)) == TEXTS
    assert fleet.log[:6] == ["ab", "cd", "refused", "taken", "forgotten", "ef"]
    assert [said for said in fleet.log if said.isalpha() and len(said) == 2] == ["ab", "cd", "ef", "gh"]
    assert fleet.sleeps == []


@pytest.mark.parametrize(("retry_after_s", "pause_s"), [(0.0, 0.1), (0.5, 0.5), (61.0, 1.0)])
def test_a_saturated_fleet_is_asked_again_until_it_takes_the_first_part(
    start: Callable[..., Fleet], retry_after_s: float, pause_s: float
) -> None:
    fleet = start(opens_at=3.0, refusal=FleetSaturated(1000, retry_after_s))
    assert list(embed_many(TEXTS)) == TEXTS
    assert set(fleet.sleeps) == {pause_s}
    assert fleet.now == pytest.approx(3.0)


def test_a_fleet_that_stays_saturated_is_told_at_the_timeout(start: Callable[..., Fleet]) -> None:
    fleet = start(room=0)
    with pytest.raises(FleetSaturated):
        next(embed_many(TEXTS, timeout_s=1.2))
    assert fleet.now == pytest.approx(1.2)


def test_without_anything_on_its_way_an_absent_server_is_told_at_once(
    start: Callable[..., Fleet],
) -> None:
    fleet = start(room=0, refusal=ServerUnavailableError("ConnectionError"))
    with pytest.raises(ServerUnavailableError):
        next(embed_many(TEXTS))
    assert fleet.sleeps == []


def test_bad_input_is_not_tried_again(start: Callable[..., Fleet]) -> None:
    fleet = start(room=1, refusal=InvalidTextError(0, "a str is needed, not None"))
    with pytest.raises(InvalidTextError):
        list(embed_many(TEXTS, batch=2))
    assert fleet.log.count("refused") == 1


@pytest.mark.parametrize("error", [redis.ConnectionError(), redis.TimeoutError(), OperationalError()])
def test_a_server_that_cannot_be_told_to_forget_takes_no_vectors_away(
    start: Callable[..., Fleet], error: Exception
) -> None:
    start(server_error=error)
    assert list(embed_many(TEXTS, batch=2)) == TEXTS
    left_early: Any = embed_many(TEXTS, batch=2)
    assert next(left_early) == "a"
    left_early.close()


def test_the_space_of_the_first_answer_is_asked_of_all_that_follow(start: Callable[..., Fleet]) -> None:
    fleet = start(spaces=["old:1", "old:1", "new:1"])
    assert list(embed_many(TEXTS, batch=2, in_flight=2)) == TEXTS
    assert fleet.pins == [None, None, "old:1", "old:1"]


def test_what_was_answered_in_another_space_is_asked_for_again(start: Callable[..., Fleet]) -> None:
    fleet = start(spaces=["old:1", "new:1", "old:1", "new:1"])
    assert list(embed_many(TEXTS, batch=2, in_flight=3)) == TEXTS
    assert fleet.pins == [None, None, None, "old:1", "old:1"]
    assert fleet.log.count("cd") == 2


def test_a_space_that_is_given_is_asked_from_the_first_message_on(start: Callable[..., Fleet]) -> None:
    fleet = start(spaces=["new:1"])
    assert list(embed_many(TEXTS, batch=4, space="old:1")) == TEXTS
    assert fleet.pins == ["old:1", "old:1"]
