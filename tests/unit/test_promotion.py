"""A promotion waits for every device that has the model, and for nobody else."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from sutra_tasks.errors import PromotionRefusedError, SutraError
from sutra_tasks.health.states import DeviceState
from sutra_tasks.membership.device_record import DeviceRecord
from sutra_tasks.membership.fleet import FleetMember
from sutra_tasks.models.rollout import promotion as module
from sutra_tasks.models.rollout.gate import Thresholds
from sutra_tasks.models.rollout.promotion import Promotion, is_affected, promote, wait_until_served
from sutra_tasks.settings import Settings
from tests.records import record
from tests.unit.fake_registry import Manifest

Said = Callable[[str, float], list[DeviceRecord]]
FOLLOWING: dict[str, Any] = {"follows": "search", "model": "search@1", "models": ("search", "search@1")}
PINNED: dict[str, Any] = {"follows": "", "model": "search@1", "models": ("search", "search@1")}


class World:
    """The server, the registry and the clock of one promotion; ``said`` gives the devices' records."""

    def __init__(self, said: Said) -> None:
        self.said, self.now = said, 0.0
        self.announced: Promotion | None = None
        self.serves = 1

    def set(self, _: str, said: str, **__: object) -> bool:
        self.announced = Promotion.from_json(said)
        return True

    def evalsha(self, *_: object) -> None:
        self.announced = None

    def fleet_members(self, _: object) -> list[FleetMember]:
        promotion = "" if self.announced is None else self.announced.id
        return [FleetMember(one.id, 0.0, one) for one in self.said(promotion, self.now)]

    def verify(self, name: str, version: int) -> Manifest:
        return Manifest(name, version)

    manifest = verify

    def current(self, _: str) -> int:
        return self.serves

    def promote(self, _: str, version: int) -> None:
        self.serves = version

    def sleep(self, _: float) -> None:
        self.now += 1.0


@pytest.fixture
def promoted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Said], list[str]]:
    def run(said: Said) -> list[str]:
        world: Any = World(said)
        monkeypatch.setattr(module, "fleet_members", world.fleet_members)
        return promote(
            world, world, "search", 2, thresholds=Thresholds(), options=Settings(),
            clock=lambda: world.now, sleep=world.sleep,
        )  # fmt: skip

    return run


def moved(promotion: str, now: float, of: str, **facts: Any) -> DeviceRecord:
    """What a device that follows says that is ready at once, and serves the new version once it may."""
    serves = {"model": "search@2"} if now > 5 else {}
    return record(of, candidate=promotion, candidate_state="ready", **(FOLLOWING | serves | facts))


def test_it_serves_when_all_are_ready(promoted: Callable[[Said], list[str]]) -> None:
    devices = promoted(lambda promotion, _: [moved(promotion, 9, of) for of in ("gpu0", "gpu1")])
    assert devices == ["gpu0", "gpu1"]


def test_with_nobody_who_has_the_model_its_files_suffice(promoted: Callable[[Said], list[str]]) -> None:
    assert promoted(lambda *_: [record("gpu0", models=("other",))]) == []


def test_who_dies_while_loading_it_has_not_agreed(promoted: Callable[[Said], list[str]]) -> None:
    def said(promotion: str, now: float) -> list[DeviceRecord]:
        return [record("gpu0", candidate=promotion, candidate_state="loading", **FOLLOWING)] * (now < 3)

    with pytest.raises(PromotionRefusedError, match="no answer in time from gpu0"):
        promoted(said)


def test_who_dies_is_waited_for_beside_others_that_are_ready(
    promoted: Callable[[Said], list[str]],
) -> None:
    def said(promotion: str, now: float) -> list[DeviceRecord]:
        dying = record("gpu1", candidate=promotion, candidate_state="loading", **FOLLOWING)
        return [moved(promotion, now, "gpu0"), *[dying] * (now < 3)]

    with pytest.raises(PromotionRefusedError, match="no answer in time from gpu1"):
        promoted(said)


def test_who_starts_with_the_model_is_waited_for(promoted: Callable[[Said], list[str]]) -> None:
    def said(promotion: str, now: float) -> list[DeviceRecord]:
        starting = record(
            "gpu0", follows="search", model="search", models=(), state=DeviceState.STARTING
        )
        return [starting if now < 100 else moved(promotion, now, "gpu0")]

    assert promoted(said) == ["gpu0"]


def test_who_is_pinned_to_a_version_is_not_waited_for(promoted: Callable[[Said], list[str]]) -> None:
    def said(promotion: str, _: float) -> list[DeviceRecord]:
        return [record("gpu0", **PINNED), moved(promotion, 9, "gpu1")]

    assert promoted(said) == ["gpu1"]


def test_only_those_that_follow_have_to_serve_it(monkeypatch: pytest.MonkeyPatch) -> None:
    records = [
        record("pinned", **PINNED),
        record("starting", **FOLLOWING, state=DeviceState.STARTING),
        record("other", follows="docs", model="docs@1", models=("docs", "docs@1", "search@1")),
    ]
    world: Any = World(lambda *_: records)
    world.serves = 2
    monkeypatch.setattr(module, "fleet_members", world.fleet_members)
    how: dict[str, Any] = {"clock": lambda: world.now, "sleep": world.sleep}
    wait_until_served(world, world, "search", Settings(), **how)
    records.append(record("behind", **FOLLOWING))
    with pytest.raises(SutraError, match=r"do not serve it .*: behind\."):
        wait_until_served(world, world, "search", Settings(), **how)
    records[-1] = replace(records[-1], model="search@2")
    wait_until_served(world, world, "search", Settings(), **how)


@pytest.mark.parametrize(
    ("follows", "serves", "models", "concerned"),
    [
        ("search", "search", (), True),
        ("search", "search@1", ("search", "search@1"), True),
        ("", "search@1", ("search@1",), False),
        ("", "search@1", ("search", "search@1"), False),
        ("", "search@1", ("search", "search@1", "search@2"), True),
        ("docs", "docs@1", ("docs", "docs@1"), False),
        ("docs", "docs@1", ("docs", "docs@1", "search", "search@1"), True),
        ("", "/home/jane/search@3/model", ("/home/jane/search@3/model", "search@x"), False),
        ("", "all-MiniLM-L6-v2", ("all-MiniLM-L6-v2", "search"), True),
    ],
)
def test_a_promotion_concerns_who_has_more_of_the_model_than_it_is_pinned_to(
    follows: str, serves: str, models: tuple[str, ...], concerned: bool
) -> None:
    assert is_affected("search", follows=follows, serves=serves, models=models) is concerned
