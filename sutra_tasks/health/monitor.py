"""One device's state: when it is looked at, by whose measure, and whether it may join the fleet.

The heartbeat's thread calls :meth:`Monitor.step`; what is decided there travels in the next record.
Beat asks for an evaluation every 30 seconds; a device that hears nothing of it evaluates itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from celery.utils.log import get_logger

from sutra_tasks import keys
from sutra_tasks.engines.golden import GoldenVectors
from sutra_tasks.errors import SutraError
from sutra_tasks.health.memory import UNKNOWN, Memory
from sutra_tasks.health.states import HealthStatus, State, Thresholds, assess, next_state

if TYPE_CHECKING:
    import redis

    from sutra_tasks.health.statistics import Statistics
    from sutra_tasks.settings import Settings

__all__ = ["CHECK_EVERY_S", "MEMORY_EVERY_S", "Exercise", "Monitor"]

logger = get_logger(__name__)

CHECK_EVERY_S: Final = 30.0
"""The specification's: health status evaluation."""

MEMORY_EVERY_S: Final = 300.0
"""The specification's: detailed memory check."""

UNASKED_S: Final = 1.5
"""Times its period after which a device does by itself what nobody asked it for."""

PROBE_EVERY_S: Final = 5.0
"""An unhealthy device shows this often whether it is well again."""

SAY: Final = """#!lua flags=allow-oom
local said = redis.call('GET', KEYS[1])
if not said then redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2]) end
return said
"""
"""KEYS: the golden vectors. ARGV: these, seconds they are kept. Allowed on a full server: whoever cannot
join does not work it empty."""

Exercise = Callable[[], "Future[GoldenVectors]"]
"""Has the model embed the golden texts, between two batches."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is known of a device's health, as one value."""

    state: State
    reason: str
    health: HealthStatus
    memory: Memory


class Monitor:
    """See the module's docstring. One thread steps it; any may read it or ask it for a look."""

    def __init__(
        self,
        options: Settings,
        client: redis.Redis,
        statistics: Statistics,
        *,
        memory: Callable[[], Memory],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client, self._statistics = client, statistics
        self._read_memory, self._clock = memory, clock
        self._thresholds = Thresholds(
            latency_multiplier=options.latency_threshold_multiplier,
            error_rate=options.max_acceptable_error_rate,
            memory_share=options.gpu_memory_threshold,
        )
        self._idle_s = options.worker_timeout_s
        self._golden_ttl_s = int(max(2, options.lease_s))
        self._verdict = Verdict(State.STARTING, "", HealthStatus(), UNKNOWN)
        self._golden: GoldenVectors | None = None
        self._exercise: Exercise | None = None
        self._exercised: Future[GoldenVectors] | None = None
        self._told: GoldenVectors | None = None
        self._asked = self._asked_memory = self._suspected = False
        self._evaluated_at = self._exercised_at = clock()
        self._memory_at = -float("inf")
        self._worked = 0

    @property
    def verdict(self) -> Verdict:
        """What was last decided."""
        return self._verdict

    @property
    def serves(self) -> bool:
        """Whether this device takes work."""
        return self._verdict.state not in (State.STARTING, State.REFUSED)

    def loaded(self, golden: GoldenVectors, exercise: Exercise) -> None:
        """Begin, or go on with another model: it is warm, and these are its vectors of known texts."""
        self._exercised = None
        self._golden, self._exercise = golden, exercise

    def agrees(self, golden: GoldenVectors) -> bool:
        """Say whether the model still gives the vectors it gave when it was warmed up.

        Vectors of a model that was replaced since say nothing against it.
        """
        ours = self._golden
        return ours is not None and (golden.space != ours.space or ours.disagreement(golden) is None)

    def ask(self, *, memory: bool) -> None:
        """Evaluate at the next step, and look at the memory if wanted."""
        self._asked = True
        self._asked_memory = self._asked_memory or memory

    def exercise(self) -> Future[GoldenVectors] | None:
        """Have the model embed known texts; None before it is loaded."""
        return self._exercise() if self._exercise is not None else None

    def step(self) -> Verdict:
        """Look at what is due; called at each heartbeat, on its thread."""
        now, golden = self._clock(), self._golden  # another model may come meanwhile
        if golden is not None:
            if not self.serves:
                self._join(golden)
            else:
                self._keep_golden(golden)
                self._look(now)
        return self._verdict

    def _join(self, golden: GoldenVectors) -> None:
        """Hold this device's vectors against the fleet's: the parity gate."""
        reason = golden.disagreement(golden)  # of itself: not a number, say
        if reason is not None:
            reason = "its vectors are no directions: not a number, infinite or zero"
        else:
            theirs = self._say(golden)
            try:
                reason = golden.disagreement(GoldenVectors.from_json(theirs)) if theirs else None
            except SutraError as error:
                reason = str(error)
        if reason is None:
            self._told = golden
        state = State.HEALTHY if reason is None else State.REFUSED
        if reason is not None and reason != self._verdict.reason:
            logger.error("refused: %s", reason)
        self._decide(state=state, reason=reason or "")

    def _keep_golden(self, golden: GoldenVectors) -> None:
        if self._told is not golden:  # who joins from now on is to have the new model
            self._client.set(keys.GOLDEN, golden.to_json(), ex=self._golden_ttl_s)
            self._told = golden
        elif not self._client.expire(keys.GOLDEN, self._golden_ttl_s):
            self._say(golden)

    def _say(self, golden: GoldenVectors) -> bytes | None:
        """Say what the fleet computes if nobody has; else return what was said."""
        said: Any = self._client.eval(SAY, 1, keys.GOLDEN, golden.to_json(), str(self._golden_ttl_s))
        return said  # type: ignore[no-any-return]  # nothing decodes

    def _look(self, now: float) -> None:
        checked = self._finished_check(now)
        if self._suspected:
            self._suspected = checked = False
        if self._asked_memory or now - self._memory_at >= UNASKED_S * MEMORY_EVERY_S:
            self._asked_memory, self._memory_at = False, now
            self._decide(memory=self._read_memory())
        if checked is None and not (
            self._asked or now - self._evaluated_at >= UNASKED_S * CHECK_EVERY_S
        ):
            return
        self._asked, self._evaluated_at = False, now
        measured = self._statistics.measurements(self._verdict.memory.share)
        before = self._verdict.state
        state = next_state(before, measured, self._thresholds, check_passed=checked)
        health = assess(measured, self._thresholds)
        reason = "its vectors of known texts changed" if checked is False else "; ".join(health.warnings)
        self._decide(state=state, health=health, reason=reason if state is not State.HEALTHY else "")
        if state is not before:
            logger.warning("%s, was %s: %s", state, before, reason or "recovered")

    def _finished_check(self, now: float) -> bool | None:
        """Return what an exercise of the model showed; begin one when it is due."""
        ended, self._exercised = self._exercised, None
        if ended is not None and not ended.done():
            self._exercised = ended
            return None
        if ended is not None:
            self._exercised_at = now
            return ended.exception() is None and self.agrees(ended.result())
        on_trial = self._verdict.state in (State.UNHEALTHY, State.PROBING)
        worked, self._worked = self._worked, self._statistics.batches
        if worked != self._worked and not on_trial:  # work proves nothing of one on trial
            self._exercised_at = now
        if now - self._exercised_at >= (PROBE_EVERY_S if on_trial else self._idle_s):
            self._exercised = self.exercise()
        return None

    def suspect(self) -> None:
        """Note that the model just failed on known texts; the next step draws the conclusion."""
        self._suspected = True

    def _decide(self, **changed: Any) -> None:
        self._verdict = Verdict(
            **{name: changed.get(name, getattr(self._verdict, name)) for name in Verdict.__slots__}
        )

    def report(self) -> dict[str, Any]:
        """Return everything as JSON values, for ``sutra health``."""
        verdict = self._verdict
        return {
            "state": verdict.state.value,
            "reason": verdict.reason,
            "is_healthy": verdict.health.is_healthy,
            **asdict(verdict.health),
            "memory": asdict(verdict.memory),
            "memory_share": verdict.memory.share,
        }
