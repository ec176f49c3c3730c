"""Another version of a model comes to serve while the fleet works: all devices, or none.

A promotion is announced on the server. Each device that has any version of the model in memory loads the
new one aside, holds it against its manifest, and says so in its record. Only when all are ready does the
registry's pointer move; devices follow it between two batches, within a heartbeat. One that cannot
load it keeps the version it has, and so does the fleet.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from celery.utils.log import get_logger

from sutra_tasks import keys
from sutra_tasks.errors import PromotionRefusedError, SutraError
from sutra_tasks.fleet.registry import serves, sightings
from sutra_tasks.models.gate import Readiness, decide

if TYPE_CHECKING:
    import redis

    from sutra_tasks.encoding.loaded import Loaded, Models
    from sutra_tasks.fleet.registry import DeviceRecord
    from sutra_tasks.models.gate import Floor
    from sutra_tasks.models.store import ModelStore
    from sutra_tasks.settings import Settings

__all__ = ["Follower", "Promotion", "await_served", "promote"]

logger = get_logger(__name__)

VERSION: Final = 1
LOADING: Final = "loading"
READY: Final = "ready"
LOOK_S: Final = 0.1
PREPARE_S: Final = 240.0
"""Seconds devices get to load a version aside."""
FOLLOW_S: Final = 60.0
"""Seconds within which devices serve what the registry says."""
AGAIN_S: Final = 30.0
"""Seconds after which a version that could not be loaded is tried once more."""
MOST_REASON: Final = 300

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


class Follower:
    """One device's part: it prepares what is announced, and serves what the registry says."""

    def __init__(
        self,
        client: redis.Redis,
        models: Models,
        store: ModelStore,
        options: Settings,
        *,
        swap: Callable[[Loaded], None],
        hasten: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare the thread.

        Args:
            client: the server with the fleet.
            models: of this device.
            store: the registry.
            options: of this deployment.
            swap: has the device serve another version; returns when it does.
            hasten: called when the device's record has changed.
            clock: seconds that never go back.
        """
        self._client, self._models, self._store, self._options = client, models, store, options
        self._swap, self._hasten, self._clock = swap, hasten, clock
        self._candidate: Promotion | None = None
        self._failed: tuple[str, float] = ("", 0.0)
        self.candidate_state = ""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="follower", daemon=True)

    @property
    def candidate(self) -> str:
        """The id of the promotion this device prepares for."""
        return self._candidate.id if self._candidate is not None else ""

    def start(self) -> None:
        """Begin to follow."""
        self._thread.start()

    def stop(self) -> None:
        """End; what is being loaded is dropped with the process."""
        self._stopping.set()

    def _run(self) -> None:
        while not self._stopping.wait(min(self._options.heartbeat_s, 0.5)):
            try:
                self.step()
            except Exception as error:  # noqa: BLE001 - a device that lives must go on following
                logger.warning("cannot look for other versions of models, trying again: %s", error)

    def step(self) -> None:
        """Look once."""
        announced = Promotion.from_json(self._client.get(keys.PROMOTION))
        if announced != self._candidate:
            self._prepare(announced)
        self._follow()
        self._models.drop_superseded()

    def _prepare(self, announced: Promotion | None) -> None:
        # Whoever has no version of it in memory needs none: it loads what a call names.
        concerned = announced is not None and self._has_any(announced.model)
        self._candidate = announced
        self._models.keep(announced.reference if announced is not None and concerned else None)
        self.candidate_state = LOADING if concerned else ""
        self._hasten()
        if announced is None or not concerned:
            return
        try:
            self._models.load(announced.reference)
        except Exception as error:  # whatever an engine raises, this version does not serve
            logger.exception("%s cannot be loaded", announced.reference)
            self.candidate_state = str(error)[:MOST_REASON] or type(error).__name__
        else:
            self.candidate_state = READY
        self._hasten()

    def _has_any(self, model: str) -> bool:
        return any(name.partition("@")[0] == model for name in self._models.names)

    def _follow(self) -> None:
        name = self._options.model
        if name not in self._store.names():
            return  # no model of the registry, or pinned to a version
        reference = f"{name}@{self._store.current(name)}"
        if reference == self._models.default.reference:
            return
        failed, at = self._failed
        if failed == reference and self._clock() - at < AGAIN_S:
            return
        try:
            loaded = self._models.load(reference)
        except Exception:
            self._failed = (reference, self._clock())
            served = self._models.default.reference
            logger.exception("%s serves on: %s cannot be loaded", served, reference)
            return
        self._swap(loaded)
        logger.info("device serves %s", reference)
        self._hasten()


def promote(
    client: redis.Redis,
    store: ModelStore,
    name: str,
    version: int,
    *,
    floor: Floor,
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
        while True:
            devices = [_readiness(one, promotion) for one in _concerned(client, name, options)]
            verdict = decide(manifest, floor, devices, now=clock(), deadline=deadline)
            if verdict.state == "refused":
                raise PromotionRefusedError(name, version, verdict.reason)
            # Nobody has it in memory, and it is good enough: whoever loads it checks it then.
            if verdict.state == "passed" or not devices:
                break
            sleep(LOOK_S)
        store.promote(name, version)
        await_served(client, store, name, options, clock=clock, sleep=sleep)
        return [one.device for one in devices]
    finally:
        client.eval(DELETE_MINE, 1, keys.PROMOTION, said)


def await_served(
    client: redis.Redis,
    store: ModelStore,
    name: str,
    options: Settings,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Return once every device that serves a model by default serves the version of the registry.

    Raises:
        SutraError: some did not in time; it names them.
    """
    reference = f"{name}@{store.current(name)}"
    deadline = clock() + FOLLOW_S
    while True:
        behind = [
            one.id
            for one in _concerned(client, name, options)
            if one.model.partition("@")[0] == name and one.model != reference
        ]
        if not behind:
            return
        if clock() > deadline:
            raise SutraError(
                f"{reference} is what the registry says, but these devices do not serve it after "
                f"{FOLLOW_S:.0f} s: {', '.join(behind)}. Their logs say why; restart them, or roll back."
            )
        sleep(LOOK_S)


def _concerned(client: redis.Redis, name: str, options: Settings) -> list[DeviceRecord]:
    """Return the live devices that have any version of a model in memory."""
    return [
        one.record
        for one in sightings(client)
        if one.record is not None
        and one.heartbeat_age_s <= options.device_ttl_s
        and serves(one)
        and any(held.partition("@")[0] == name for held in one.record.models)
    ]


def _readiness(record: DeviceRecord, promotion: Promotion) -> Readiness:
    if record.candidate != promotion.id or record.candidate_state in ("", LOADING):
        return Readiness(record.id, "waiting", "")
    if record.candidate_state == READY:
        return Readiness(record.id, "ready", "")
    return Readiness(record.id, "failed", record.candidate_state)
