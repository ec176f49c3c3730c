"""Promotes a version of a model while the fleet works: all devices serve it, or none does.

``promote`` announces a promotion on the server. Each device that has any version of the model in memory
loads the new one beside it, compares it with its manifest, and reports in its device record. When all
devices are ready, ``promote`` makes the version the registry's serving one, and devices switch to it
between two batches, within a heartbeat. If a device cannot load it, no device switches.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from sutra_tasks import keys, lua
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
POLL_S: Final = 0.1
LOADING_TIMEOUT_S: Final = 240.0
"""Seconds within which devices have to load a version."""
SERVING_TIMEOUT_S: Final = 60.0
"""Seconds within which devices have to serve the registry's version."""

DELETE_IF_EQUAL: Final = lua.script("delete_if_equal")


@dataclass(frozen=True, slots=True)
class Promotion:
    """The announcement of a version that devices have to load; ``id`` distinguishes attempts."""

    id: str
    model: str
    version: int

    @property
    def reference(self) -> str:
        """The version as calls name it."""
        return f"{self.model}@{self.version}"

    def to_json(self) -> str:
        """Return the announcement as JSON."""
        return json.dumps({"v": VERSION, **asdict(self)})

    @classmethod
    def from_json(cls, text: bytes | str | None) -> Promotion | None:
        """Read an announcement; None if there is none, or another release wrote it."""
        value: Any = json.loads(text) if text is not None else None
        if value is None or value.get("v") != VERSION:
            return None
        return cls(value["id"], value["model"], value["version"])


def followed_model(options: Settings) -> str:
    """Return the registry model whose serving version a device serves; "" if it serves a fixed one."""
    return options.model if options.models_dir is not None and is_model_name(options.model) else ""


def is_affected(name: str, *, follows: str, serves: str, models: Iterable[str]) -> bool:
    """Return whether a device has to load the new version of a model.

    It has to if any version of the model is in its memory, except one that the device is pinned to.

    Args:
        name: the model.
        follows: the model that the device follows, if any.
        serves: the reference that it serves by default.
        models: the models in its memory, by all their names.
    """
    if follows == name:
        return True
    versions = {one for one in models if bare_name(one) == name}
    if bare_name(serves) == name:
        versions -= {serves, name}  # the bare name is only another name of the pinned version
    return bool(versions)


def promote(
    client: redis.Redis,
    registry: ModelRegistry,
    name: str,
    version: int,
    *,
    thresholds: Thresholds,
    options: Settings,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> list[str]:
    """Make a version serve if it passes the gate; return the ids of the devices that loaded it.

    If no device has the model in memory, only its files and its quality are checked.

    Raises:
        PromotionRefusedError: it did not pass; nothing changed.
        ModelError: there is no such version, or its files differ from its manifest.
    """
    registry.verify(name, version)
    manifest = registry.manifest(name, version)
    promotion = Promotion(uuid.uuid4().hex, name, version)
    announcement = promotion.to_json()
    if not client.set(keys.promotion(), announcement, nx=True, ex=keys.PROMOTION_S):
        raise PromotionRefusedError(name, version, "another promotion is under way")
    try:
        deadline = clock() + LOADING_TIMEOUT_S
        asked: set[str] = set()
        while True:
            devices = [_readiness(one, promotion) for one in _affected(client, name, options)]
            live = {one.device for one in devices}
            asked |= live
            # A device that died may have died of loading the version.
            devices += [DeviceReadiness(one, "waiting") for one in sorted(asked - live)]
            decision = decide(manifest, thresholds, devices, now=clock(), deadline=deadline)
            if decision.state == "refused":
                raise PromotionRefusedError(name, version, decision.reason)
            # Without devices the quality alone decides: a device that loads it later checks it then.
            if decision.state == "passed" or not devices:
                break
            sleep(POLL_S)
        registry.promote(name, version)
        wait_until_served(client, registry, name, options, clock=clock, sleep=sleep)
        return [one.device for one in devices]
    finally:
        DELETE_IF_EQUAL(client, key=keys.promotion(), value=announcement)


def wait_until_served(
    client: redis.Redis,
    registry: ModelRegistry,
    name: str,
    options: Settings,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Return when every device that follows a model serves the registry's version of it.

    A device that is pinned to a version keeps it.

    Raises:
        SutraError: some devices did not in time; it names them.
    """
    reference = f"{name}@{registry.current(name)}"
    deadline = clock() + SERVING_TIMEOUT_S
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
                f"{SERVING_TIMEOUT_S:.0f} s: {', '.join(behind)}. Their logs say why; restart them, or "
                "roll back."
            )
        sleep(POLL_S)


def _live(client: redis.Redis, options: Settings) -> Iterator[tuple[FleetMember, DeviceRecord]]:
    for one in fleet_members(client):
        if one.record is not None and one.is_live(options.device_ttl_s):
            yield one, one.record


def _affected(client: redis.Redis, name: str, options: Settings) -> list[DeviceRecord]:
    """Return the live devices that have a model in memory, or that start with it."""
    return [
        record
        for seen, record in _live(client, options)
        if (seen.takes_work or record.state is DeviceState.STARTING)
        and is_affected(name, follows=record.follows, serves=record.model, models=record.models)
    ]


def _readiness(record: DeviceRecord, promotion: Promotion) -> DeviceReadiness:
    if record.candidate != promotion.id or record.candidate_state in ("", LOADING):
        return DeviceReadiness(record.id, "waiting")
    if record.candidate_state == READY:
        return DeviceReadiness(record.id, "ready")
    return DeviceReadiness(record.id, "failed", record.candidate_state)
