"""Evaluates the health of one device, and lets it join the fleet.

The heartbeat's thread calls :meth:`Monitor.step`, and the next record carries the verdict. Celery beat
asks for an evaluation every 30 seconds; a device that is not asked evaluates itself a little later.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from celery.utils.log import get_logger

from sutra_tasks.health.memory import UNKNOWN, Memory
from sutra_tasks.health.parity import FleetGolden
from sutra_tasks.health.states import DeviceState, HealthStatus, HealthThresholds, assess, next_state

if TYPE_CHECKING:
    from concurrent.futures import Future

    import redis

    from sutra_tasks.engines.golden import GoldenVectors
    from sutra_tasks.health.statistics import Statistics
    from sutra_tasks.settings import Settings

__all__ = ["CHECK_EVERY_S", "MEMORY_EVERY_S", "Exercise", "Monitor"]

logger = get_logger(__name__)

CHECK_EVERY_S: Final = 30.0
"""The specification's: health status evaluation."""

MEMORY_EVERY_S: Final = 300.0
"""The specification's: detailed memory check."""

UNASKED: Final = 1.5
"""A device that is not asked acts by itself after so many periods."""

PROBE_EVERY_S: Final = 5.0
"""Seconds between two self-checks of an unhealthy or probing device."""

Exercise = Callable[[], "Future[GoldenVectors]"]
"""A self-check: the model embeds the golden texts, between two batches."""


@dataclass(frozen=True, slots=True)
class HealthVerdict:
    """What the monitor last decided about its device."""

    state: DeviceState
    reason: str
    health: HealthStatus
    memory: Memory


class Monitor:
    """Decides the state of one device. One thread calls :meth:`step`; any thread may call the rest."""

    def __init__(
        self,
        options: Settings,
        client: redis.Redis,
        statistics: Statistics,
        *,
        memory: Callable[[], Memory],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin with a device that starts.

        Args:
            options: with thresholds and times.
            client: the broker.
            statistics: of this device.
            memory: reads the memory of this device.
            clock: monotonic seconds.
        """
        self._statistics = statistics
        self._read_memory, self._clock = memory, clock
        self._thresholds = HealthThresholds(
            latency_multiplier=options.latency_threshold_multiplier,
            error_rate=options.max_acceptable_error_rate,
            memory_share=options.gpu_memory_threshold,
        )
        self._idle_s = options.worker_timeout_s
        self._fleet_golden = FleetGolden(client, keep_s=int(max(2, options.lease_s)))
        self._verdict = HealthVerdict(DeviceState.STARTING, "", HealthStatus(), UNKNOWN)
        self._golden: GoldenVectors | None = None
        self._exercise: Exercise | None = None
        self._exercised: Future[GoldenVectors] | None = None
        self._asked = self._asked_memory = self._suspected = False
        self._evaluated_at = self._exercised_at = clock()
        self._memory_at = -float("inf")
        self._worked = 0

    @property
    def verdict(self) -> HealthVerdict:
        """What was decided last."""
        return self._verdict

    @property
    def takes_work(self) -> bool:
        """Whether this device takes work."""
        return self._verdict.state.takes_work

    def loaded(self, golden: GoldenVectors, exercise: Exercise) -> None:
        """Begin with a model, or go on with another one.

        Args:
            golden: its golden vectors, computed when it was warmed up.
            exercise: has it compute them again.
        """
        self._exercised = None
        self._golden, self._exercise = golden, exercise

    def agrees(self, golden: GoldenVectors) -> bool:
        """Say whether the model still computes the golden vectors that it computed at its warm-up.

        Vectors of a model that was replaced since count as agreement.
        """
        ours = self._golden
        return ours is not None and (golden.space != ours.space or ours.disagreement(golden) is None)

    def ask(self, *, memory: bool) -> None:
        """Evaluate at the next step, and read the memory before if ``memory``."""
        self._asked = True
        self._asked_memory = self._asked_memory or memory

    def exercise(self) -> Future[GoldenVectors] | None:
        """Begin a self-check; None before a model is loaded."""
        return self._exercise() if self._exercise is not None else None

    def step(self) -> HealthVerdict:
        """Do what is due; called before each heartbeat, on its thread."""
        now, golden = self._clock(), self._golden  # another thread may load another model meanwhile
        if golden is not None:
            if self.takes_work:
                self._fleet_golden.renew(golden)
                self._evaluate_if_due(now)
            else:
                self._join(golden)
        return self._verdict

    def _join(self, golden: GoldenVectors) -> None:
        reason = self._fleet_golden.disagreement(golden)
        if reason is not None and reason != self._verdict.reason:
            logger.error("refused: %s", reason)
        state = DeviceState.HEALTHY if reason is None else DeviceState.REFUSED
        self._verdict = replace(self._verdict, state=state, reason=reason or "")

    def _evaluate_if_due(self, now: float) -> None:
        check_passed = self._finished_check(now)
        if self._suspected:
            self._suspected = check_passed = False
        if self._asked_memory or now - self._memory_at >= UNASKED * MEMORY_EVERY_S:
            self._asked_memory, self._memory_at = False, now
            self._verdict = replace(self._verdict, memory=self._read_memory())
        is_due = self._asked or now - self._evaluated_at >= UNASKED * CHECK_EVERY_S
        if is_due or check_passed is not None:
            self._asked, self._evaluated_at = False, now
            self._evaluate(check_passed)

    def _evaluate(self, check_passed: bool | None) -> None:
        """Decide the state.

        Args:
            check_passed: whether a self-check since the last evaluation passed; None: there was none.
        """
        measured = self._statistics.measurements(self._verdict.memory.share)
        before = self._verdict.state
        state = next_state(before, measured, self._thresholds, check_passed=check_passed)
        health = assess(measured, self._thresholds)
        reason = "; ".join(health.warnings)
        if check_passed is False:
            reason = "its vectors of known texts changed"
        self._verdict = replace(
            self._verdict,
            state=state,
            health=health,
            reason=reason if state is not DeviceState.HEALTHY else "",
        )
        if state is not before:
            logger.warning("%s, was %s: %s", state, before, reason or "recovered")

    def _finished_check(self, now: float) -> bool | None:
        """Return whether a self-check passed that has ended since; begin one when it is due."""
        ended = self._exercised
        if ended is not None:
            if not ended.done():
                return None
            self._exercised, self._exercised_at = None, now
            return ended.exception() is None and self.agrees(ended.result())
        on_trial = self._verdict.state in (DeviceState.UNHEALTHY, DeviceState.PROBING)
        worked, self._worked = self._worked, self._statistics.batches
        if worked != self._worked and not on_trial:  # work is a check, except of a device on trial
            self._exercised_at = now
        if now - self._exercised_at >= (PROBE_EVERY_S if on_trial else self._idle_s):
            self._exercised = self.exercise()
        return None

    def suspect(self) -> None:
        """Note that the model failed a self-check elsewhere; the next step evaluates it."""
        self._suspected = True

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
