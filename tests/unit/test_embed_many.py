"""``embed_many`` waits for a saturated fleet, and for a server that is down."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import redis
from celery.exceptions import TimeoutError as ResultTimeout
from kombu.exceptions import OperationalError

from sutra_tasks import (
    EncodingError,
    FleetSaturated,
    InvalidInputError,
    InvalidOptionError,
    InvalidTextError,
    ServerUnavailableError,
    TooLargeError,
    embed_many,
)
from sutra_tasks.client import embed_many as bulk
from sutra_tasks.settings import settings

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

    kept_s: float = 600.0
    answer_s: float = 0.0
    failure: Exception | None = None

    def apply_async(
        self, args: tuple[list[str]], options: Any, *, priority: int, add_to_parent: bool
    ) -> "Result":
        assert priority > 0, "bulk goes behind single calls"
        assert not add_to_parent, "the results of a task's calls would pile up in it"
        (texts,) = args
        if self.waiting >= self.room or self.now < self.opens_at:
            self.log.append("refused")
            raise self.refusal
        self.waiting += 1
        self.log.append("".join(texts))
        self.pins.append(options["space"])
        served = self.spaces.pop(0) if len(self.spaces) > 1 else self.spaces[0]
        came_at = self.now + self.answer_s
        return Result(self, texts, options["space"] or served, came_at)

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
    came_at: float
    is_seen: bool = False

    def get(self, *, timeout: float, propagate: bool = True) -> Any:
        fleet = self.fleet
        if not self.is_seen and self.came_at + fleet.kept_s <= fleet.now:  # nobody looked in time
            fleet.now += timeout
            raise ResultTimeout
        if self.came_at > fleet.now + timeout:
            fleet.now += timeout
            raise ResultTimeout
        fleet.now = max(fleet.now, self.came_at)
        self.is_seen = True
        if not propagate:
            return None
        fleet.waiting -= 1
        fleet.log.append("taken")
        if fleet.failure is not None:
            raise fleet.failure
        return SimpleNamespace(vectors=self.texts, space=self.space, model="search@2")

    def expires_in_s(self) -> float:
        return self.fleet.kept_s

    def forget(self) -> None:
        self.fleet.log.append("forgotten")
        if self.fleet.server_error:
            raise self.fleet.server_error

    revoke = forget


@pytest.fixture(autouse=True)
def _small_messages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SUTRA_MAX_MESSAGE_BYTES", "10")
    monkeypatch.setenv("SUTRA_MAX_TEXTS", "6")
    settings.cache_clear()
    yield
    settings.cache_clear()


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


# Texts as callers have them.


@pytest.mark.parametrize(
    ("texts", "messages"),
    [
        (["x" * 6, "y" * 4, "z"], ["x" * 6 + "y" * 4, "z"]),
        (["x" * 10, "y" * 10], ["x" * 10, "y" * 10]),
        (["é" * 3, "é" * 3], ["é" * 3, "é" * 3]),
        (list("abcdefg"), ["abcdef", "g"]),  # SUTRA_MAX_TEXTS is less than the batch
    ],
)
def test_messages_are_as_small_as_the_limits_ask(
    start: Callable[..., Fleet], texts: list[str], messages: list[str]
) -> None:
    fleet = start()
    assert list(embed_many(texts)) == texts
    assert [said for said in fleet.log if said not in ("taken", "forgotten")] == messages


@pytest.mark.parametrize("in_flight", [1, 3])
@pytest.mark.parametrize(
    ("bad", "told"), [(None, InvalidTextError), ("\ud800", InvalidTextError), ("é" * 6, TooLargeError)]
)
def test_a_bad_text_is_told_by_its_place_among_all_after_the_vectors_of_those_before(
    start: Callable[..., Fleet], bad: Any, told: type[Exception], in_flight: int
) -> None:
    fleet = start()
    vectors = embed_many(["ok"] * 5 + [bad] + ["ok"] * 5, batch=2, in_flight=in_flight)
    assert [next(vectors) for _ in range(5)] == ["ok"] * 5
    with pytest.raises(told, match=r"texts\[5\]"):
        next(vectors)
    assert fleet.waiting == 0


def test_an_error_of_a_device_counts_all_texts(start: Callable[..., Fleet]) -> None:
    fleet = start()
    vectors = embed_many(TEXTS, batch=2, in_flight=1)
    next(vectors), next(vectors)
    fleet.failure = EncodingError("gpu0", 1, "broken")
    with pytest.raises(EncodingError) as told:
        next(vectors)
    assert told.value.args == ("gpu0", 3, "broken")


def test_an_iterable_that_raises_loses_nothing_before_and_leaves_nothing(
    start: Callable[..., Fleet],
) -> None:
    def broken() -> Iterator[str]:
        yield from "abcde"
        raise OSError("the file ends here")

    fleet = start()
    vectors = embed_many(broken(), batch=2)
    assert [next(vectors) for _ in range(5)] == list("abcde")
    with pytest.raises(OSError, match="ends here"):
        next(vectors)
    assert fleet.log.count("forgotten") == 3


@pytest.mark.parametrize(
    "texts",
    [
        lambda: (text for text in "ab"),
        lambda: np.array(["a", "b"]),
        lambda: np.array(["a", "b"], dtype=object),
        {"a": 1, "b": 2}.keys,
        {1: "a", 2: "b"}.values,
        lambda: deque(["a", "b"]),
        lambda: map(str.lower, "AB"),
        lambda: dict.fromkeys("ab").keys() | set(),
    ],
)
def test_any_iterable_will_do(start: Callable[..., Fleet], texts: Callable[[], Any]) -> None:
    start()
    assert sorted(embed_many(texts())) == ["a", "b"]


class Table:
    """Stands for a table of pandas: iterated over, it gives the names of its columns."""

    ndim = 2

    def __iter__(self) -> Iterator[str]:
        return iter(["text", "id"])


@pytest.mark.parametrize(
    "texts",
    ["hello", b"hello", bytearray(b"a"), None, 5, {"a": "b"}, np.array([["a"]]), np.array("a"), Table()],
)
def test_what_gives_no_texts_one_after_the_other_is_refused_at_once(
    start: Callable[..., Fleet], texts: Any
) -> None:
    fleet = start()
    with pytest.raises(InvalidInputError, match="embed_many"):
        embed_many(texts)
    assert fleet.log == []


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("batch", 0), ("batch", "64"), ("batch", True), ("in_flight", 1.5), ("timeout_s", "1"),
        ("timeout_s", -1), ("timeout_s", float("nan")), ("dimensions", "8"), ("prompt", 1),
    ],
)  # fmt: skip
def test_an_option_that_cannot_be_is_refused_at_once(option: str, value: Any) -> None:
    options: Any = {option: value}
    with pytest.raises(InvalidOptionError) as refused:
        embed_many([], **options)
    assert refused.value.option == option


# Slow callers and slow fleets.


def test_what_expired_while_the_caller_was_away_is_sent_again(start: Callable[..., Fleet]) -> None:
    fleet = start(kept_s=100.0)
    vectors = embed_many(TEXTS, batch=2, in_flight=4)
    assert [next(vectors) for _ in range(2)] == ["a", "b"]
    fleet.now += 101
    assert list(vectors) == list("cdefgh")
    assert [fleet.log.count(said) for said in ("ab", "cd", "ef", "gh")] == [1, 2, 2, 2]


@pytest.mark.parametrize("away_s", [0, 49, 51, 99])
def test_what_cannot_have_expired_is_not_sent_again(start: Callable[..., Fleet], away_s: float) -> None:
    fleet = start(kept_s=100.0)
    vectors = embed_many(TEXTS, batch=2, in_flight=4)
    next(vectors), next(vectors)
    fleet.now += away_s
    assert list(vectors) == list("cdefgh")
    assert fleet.log.count("cd") == 1


def test_a_fleet_that_takes_longer_than_results_are_kept_is_asked_once(
    start: Callable[..., Fleet],
) -> None:
    fleet = start(kept_s=100.0, answer_s=5000.0)
    assert list(embed_many(TEXTS, batch=2, in_flight=4)) == TEXTS
    assert fleet.log.count("cd") == 1


def test_a_message_may_take_as_long_as_the_timeout(start: Callable[..., Fleet]) -> None:
    fleet = start(answer_s=1000.0)
    assert list(embed_many(["a"], timeout_s=1001)) == ["a"]
    fleet = start(answer_s=1000.0)
    with pytest.raises(ResultTimeout):
        next(embed_many(["a"], timeout_s=999))
    assert fleet.now == pytest.approx(999)
