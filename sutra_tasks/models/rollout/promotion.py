"""Another version of a model comes to serve while the fleet works: all devices, or none.

A promotion is announced on the server. Each device that has any version of the model in memory loads the
new one aside, holds it against its manifest, and says so in its record. Only when all are ready does the
registry's pointer move; devices follow it between two batches, within a heartbeat. One that cannot
load it keeps the version it has, and so does the fleet.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from sutra_tasks import keys
from sutra_tasks.errors import PromotionRefusedError, SutraError
from sutra_tasks.health.states import DeviceState
from sutra_tasks.membership.fleet import fleet_members
from sutra_tasks.models.registry.names import bare_name, is_model_name
from sutra_tasks.models.rollout.gate import DeviceReadiness, decide

if TYPE_CHECKING:
    import redis

    from sutra_tasks.membership.device_record import DeviceRecord
    from sutra_tasks.membership.fleet import FleetMember
    from sutra_tasks.models.registry.model_registry import ModelRegistry
    from sutra_tasks.models.rollout.gate import Thresholds
    from sutra_tasks.settings import Settings

__all__ = [
    "LOADING",
    "READY",
    "Promotion",
    "followed_model",
    "is_affected",
    "promote",
    "wait_until_served",
]

VERSION: Final = 1
LOADING: Final = "loading"
READY: Final = "ready"
LOOK_S: Final = 0.1
PREPARE_S: Final = 240.0
"""Seconds devices get to load a version aside."""
FOLLOW_S: Final = 60.0
"""Seconds within which devices serve what the registry says."""

DELETE_MINE: Final = """
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
"""
"""KEYS: the promotion. ARGV: what it holds if it is still this one."""


@dataclass(frozen=True, slots=True)
class Promotion:
    """A version that devices are to load aside; ``id`` tells one attempt from the next."""

    id: str
    model: str
    version: int

    @property
    def reference(self) -> str:
        """The version as calls name it."""
        return f"{self.model}@{self.version}"

    def to_json(self) -> str:
        """Return the stored form."""
        return json.dumps({"v": VERSION, **asdict(self)})

    @classmethod
    def from_json(cls, text: bytes | str | None) -> Promotion | None:
        """Read the stored form; None if there is none, or of another release."""
        value: Any = json.loads(text) if text is not None else None
        if value is None or value.get("v") != VERSION:
            return None
        return cls(value["id"], value["model"], value["version"])


def followed_model(options: Settings) -> str:
    """Return the model whose serving version a device serves by default; none if it stays with one."""
    return options.model if options.models_dir is not None and is_model_name(options.model) else ""


def is_affected(name: str, *, follows: str, serves: str, models: Iterable[str]) -> bool:
    """Say whether a device has any version of a model in memory, beyond one that it is pinned to.

    Args:
        name: the model.
        follows: the model that the device follows, if any.
        serves: what it serves by default.
        models: what it has in memory, by every name.
    """
    if follows == name:
        return True
    held = {one for one in models if bare_name(one) == name}
    if bare_name(serves) == name:
        held -= {serves, name}  # the bare name is only another one of what it is pinned to
    return bool(held)


def promote(
    client: redis.Redis,
    store: ModelRegistry,
    name: str,
    version: int,
    *,
    floor: Thresholds,
    options: Settings,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> list[str]:
    """Have a version serve if it passes the gate on every device; return the devices that checked it.

    With no device that has the model in memory only its files and its quality are checked.

    Raises:
        PromotionRefusedError: it did not pass; nothing changed.
        ModelError: there is no such version, or its files are not those of its manifest.
    """
    store.verify(name, version)
    manifest = store.manifest(name, version)
    promotion = Promotion(uuid.uuid4().hex, name, version)
    said = promotion.to_json()
    if not client.set(keys.PROMOTION, said, nx=True, ex=keys.PROMOTION_S):
        raise PromotionRefusedError(name, version, "another promotion is under way")
    try:
        deadline = clock() + PREPARE_S
        asked: set[str] = set()
        while True:
            devices = [_readiness(one, promotion) for one in _concerned(client, name, options)]
            present = {one.device for one in devices}
            asked |= present
            # Loading it may be what ended those that are gone.
            devices += [DeviceReadiness(one, "waiting") for one in sorted(asked - present)]
            verdict = decide(manifest, floor, devices, now=clock(), deadline=deadline)
            if verdict.state == "refused":
                raise PromotionRefusedError(name, version, verdict.reason)
            # Nobody has it in memory, and it is good enough: whoever loads it checks it then.
            if verdict.state == "passed" or not devices:
                break
            sleep(LOOK_S)
        store.promote(name, version)
        wait_until_served(client, store, name, options, clock=clock, sleep=sleep)
        return [one.device for one in devices]
    finally:
        client.eval(DELETE_MINE, 1, keys.PROMOTION, said)


def wait_until_served(
    client: redis.Redis,
    store: ModelRegistry,
    name: str,
    options: Settings,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Return once every device that follows a model serves the version of the registry.

    One that is pinned to a version stays with it, and one that starts joins with what serves by then.

    Raises:
        SutraError: some did not in time; it names them.
    """
    reference = f"{name}@{store.current(name)}"
    deadline = clock() + FOLLOW_S
    while True:
        behind = [
            record.id
            for seen, record in _live(client, options)
            if record.follows == name and record.model != reference and seen.takes_work
        ]
        if not behind:
            return
        if clock() > deadline:
            raise SutraError(
                f"{reference} is what the registry says, but these devices do not serve it after "
                f"{FOLLOW_S:.0f} s: {', '.join(behind)}. Their logs say why; restart them, or roll back."
            )
        sleep(LOOK_S)


def _live(client: redis.Redis, options: Settings) -> Iterator[tuple[FleetMember, DeviceRecord]]:
    for one in fleet_members(client):
        if one.record is not None and one.heartbeat_age_s <= options.device_ttl_s:
            yield one, one.record


def _concerned(client: redis.Redis, name: str, options: Settings) -> list[DeviceRecord]:
    """Return the live devices that have a model in memory, or are about to."""
    return [
        record
        for seen, record in _live(client, options)
        if (seen.takes_work or record.state is DeviceState.STARTING)
        and is_affected(name, follows=record.follows, serves=record.model, models=record.models)
    ]


def _readiness(record: DeviceRecord, promotion: Promotion) -> DeviceReadiness:
    if record.candidate != promotion.id or record.candidate_state in ("", LOADING):
        return DeviceReadiness(record.id, "waiting", "")
    if record.candidate_state == READY:
        return DeviceReadiness(record.id, "ready", "")
    return DeviceReadiness(record.id, "failed", record.candidate_state)
