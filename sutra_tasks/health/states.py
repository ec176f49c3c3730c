"""How a device is: pure decisions over what was counted.

:func:`assess` says what is wrong now; :func:`next_state` says what follows from it. ``docs/fleet.md``
draws the states.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

__all__ = ["HealthStatus", "Measurements", "State", "Thresholds", "assess", "next_state"]

LEAST_TEXTS: Final = 20
"""Recent texts from which on an error rate counts: one failure among three says nothing."""

EASED_LATENCY: Final = 0.5
"""Share of the way from a usual time to a slow one that a degraded device must be under to recover."""

EASED_MEMORY: Final = 0.95
"""The same for memory; so near the threshold because a model may fill most of a device for good."""


class State(StrEnum):
    """Where a device is in its life; docs/fleet.md draws the ways between these."""

    STARTING = "starting"
    HEALTHY = "healthy"
    DEGRADED = "degraded"
    UNHEALTHY = "unhealthy"
    PROBING = "probing"
    REFUSED = "refused"
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Where a measurement becomes a warning; each counts when it is passed, not when it is met.

    Attributes:
        latency_multiplier: times the usual batch time, 1 or more.
        error_rate: share of recent texts that failed.
        memory_share: share of the device's memory in use.
    """

    latency_multiplier: float
    error_rate: float
    memory_share: float

    def eased(self) -> Thresholds:
        """Return what a degraded device must be under to recover, so that it does not flap."""
        return Thresholds(
            # The usual ratio is 1, so only what is above it shrinks.
            latency_multiplier=1 + EASED_LATENCY * (self.latency_multiplier - 1),
            error_rate=self.error_rate,  # errors make unhealthy, not degraded
            memory_share=EASED_MEMORY * self.memory_share,
        )


@dataclass(frozen=True, slots=True)
class Measurements:
    """What was counted of a device lately; None is not known, which is neither good nor bad.

    Attributes:
        recent_latency_s: mean compute time of its recent batches.
        baseline_latency_s: mean of what batches of those sizes usually take on this device.
        recent_texts: texts it computed lately, those that failed included.
        recent_errors: those that failed.
        memory_share: share of its memory in use, 0 to 1.
    """

    recent_latency_s: float | None = None
    baseline_latency_s: float | None = None
    recent_texts: int = 0
    recent_errors: int = 0
    memory_share: float | None = None


@dataclass(frozen=True, slots=True)
class HealthStatus:
    """What is wrong with a device; each warning begins with the specification's words."""

    performance_degraded: bool = False
    high_error_rate: bool = False
    memory_pressure: bool = False
    warnings: tuple[str, ...] = ()

    @property
    def is_healthy(self) -> bool:
        """Whether nothing is."""
        return not (self.performance_degraded or self.high_error_rate or self.memory_pressure)


def assess(measured: Measurements, thresholds: Thresholds) -> HealthStatus:
    """Hold measurements against thresholds: ``monitor_gpu_health`` of the specification."""
    warnings: list[str] = []
    recent_s, usual_s = measured.recent_latency_s, measured.baseline_latency_s
    slow = (
        recent_s is not None
        and usual_s is not None
        and recent_s > usual_s * thresholds.latency_multiplier
    )
    if slow:
        warnings.append(
            f"Latency degradation detected: {_milliseconds(recent_s)} a batch, "
            f"usually {_milliseconds(usual_s)}"
        )
    failing = measured.recent_texts >= LEAST_TEXTS and _errs(measured, thresholds)
    if failing:
        warnings.append(
            f"High error rate detected: {measured.recent_errors:,} of "
            f"{measured.recent_texts:,} recent texts failed"
        )
    share = measured.memory_share
    pressed = share is not None and share > thresholds.memory_share
    if pressed:
        warnings.append(f"GPU memory pressure: {share:.0%} in use")
    return HealthStatus(slow, failing, pressed, tuple(warnings))


def next_state(
    state: State, measured: Measurements, thresholds: Thresholds, *, check_passed: bool | None
) -> State:
    """Decide a device's state at an evaluation.

    Args:
        state: its state until now.
        measured: what was counted of it lately.
        thresholds: where that becomes a warning.
        check_passed: whether its vectors for known texts were right, in a self-check made since the
            last evaluation; None if none was made. An unhealthy or probing device needs one at every
            evaluation, for nothing else brings it back.
    """
    if state in (State.REFUSED, State.DEAD):  # decided elsewhere
        return state
    status = assess(measured, thresholds)
    on_trial = state in (State.UNHEALTHY, State.PROBING)
    # On trial, a few texts are all there is to judge by.
    failing = _errs(measured, thresholds) if on_trial else status.high_error_rate
    if failing or check_passed is False:
        return State.UNHEALTHY
    if on_trial and check_passed is None:
        return state
    if state is State.UNHEALTHY:
        return State.PROBING
    if state is State.DEGRADED:
        status = assess(measured, thresholds.eased())
    return State.HEALTHY if status.is_healthy else State.DEGRADED


def _errs(measured: Measurements, thresholds: Thresholds) -> bool:
    return measured.recent_errors > thresholds.error_rate * measured.recent_texts


def _milliseconds(seconds: float | None) -> str:
    return f"{1000 * (seconds or 0.0):.3g} ms"
