"""States of a device, and the decisions between them; no I/O.

:func:`assess` compares measurements with thresholds; :func:`next_state` decides the state that follows.
``docs/fleet.md`` draws the states.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

__all__ = [
    "DeviceState",
    "HealthMeasurements",
    "HealthStatus",
    "HealthThresholds",
    "assess",
    "next_state",
]

LEAST_TEXTS: Final = 20
"""An error rate counts from so many recent texts on: one failure among three says nothing."""

EASED_LATENCY: Final = 0.5
"""Where a degraded device recovers, between its baseline time (0) and the time that degrades it (1)."""

EASED_MEMORY: Final = 0.95
"""A degraded device recovers under this share of the memory threshold; close to it, because a model may
fill most of a device for good."""


class DeviceState(StrEnum):
    """The state of a device; docs/fleet.md draws which follows which."""

    STARTING = "starting"
    HEALTHY = "healthy"
    DEGRADED = "degraded"
    UNHEALTHY = "unhealthy"
    PROBING = "probing"
    REFUSED = "refused"
    DEAD = "dead"

    @property
    def takes_work(self) -> bool:
        """Whether a live device in this state takes work, however well it computes."""
        return self not in (DeviceState.STARTING, DeviceState.REFUSED)


@dataclass(frozen=True, slots=True)
class HealthThresholds:
    """Where a measurement becomes a warning: above these, not at them.

    Attributes:
        latency_multiplier: times the baseline batch time, 1 or more.
        error_rate: share of recent texts that failed.
        memory_share: share of the device's memory in use.
    """

    latency_multiplier: float
    error_rate: float
    memory_share: float

    def for_recovery(self) -> HealthThresholds:
        """Return lower thresholds, under which a degraded device recovers; so it does not flap."""
        return HealthThresholds(
            # The ratio of a healthy device is 1: only the part above 1 shrinks.
            latency_multiplier=1 + EASED_LATENCY * (self.latency_multiplier - 1),
            error_rate=self.error_rate,  # errors make unhealthy, not degraded
            memory_share=EASED_MEMORY * self.memory_share,
        )


@dataclass(frozen=True, slots=True)
class HealthMeasurements:
    """What a device measured lately; None: not known, which counts as neither good nor bad.

    Attributes:
        recent_latency_s: mean compute time of its recent batches.
        baseline_latency_s: mean baseline time of batches of the same sizes on this device.
        recent_texts: texts of the last minute, failed ones included.
        recent_errors: failed texts of the last minute.
        memory_share: share of its memory in use, 0 to 1.
    """

    recent_latency_s: float | None = None
    baseline_latency_s: float | None = None
    recent_texts: int = 0
    recent_errors: int = 0
    memory_share: float | None = None


@dataclass(frozen=True, slots=True)
class HealthStatus:
    """What is wrong with a device; each warning begins with the words of the specification."""

    performance_degraded: bool = False
    high_error_rate: bool = False
    memory_pressure: bool = False
    warnings: tuple[str, ...] = ()

    @property
    def is_healthy(self) -> bool:
        """Whether nothing is wrong."""
        return not (self.performance_degraded or self.high_error_rate or self.memory_pressure)


def assess(measured: HealthMeasurements, thresholds: HealthThresholds) -> HealthStatus:
    """Compare measurements with thresholds: ``monitor_gpu_health`` of the specification."""
    warnings: list[str] = []
    recent_s, baseline_s = measured.recent_latency_s, measured.baseline_latency_s
    slow = (
        recent_s is not None
        and baseline_s is not None
        and recent_s > baseline_s * thresholds.latency_multiplier
    )
    if slow:
        warnings.append(
            f"Latency degradation detected: {_milliseconds(recent_s)} a batch, "
            f"usually {_milliseconds(baseline_s)}"
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
    state: DeviceState,
    measured: HealthMeasurements,
    thresholds: HealthThresholds,
    *,
    check_passed: bool | None,
) -> DeviceState:
    """Decide a device's state at an evaluation.

    Args:
        state: its state until now.
        measured: what it measured lately.
        thresholds: above them a measurement becomes a warning.
        check_passed: whether its golden vectors were right in a self-check since the last evaluation;
            None: there was no self-check. An unhealthy or probing device recovers only by self-checks,
            one at every evaluation.
    """
    if state in (DeviceState.REFUSED, DeviceState.DEAD):  # decided by the parity gate and by heartbeats
        return state
    status = assess(measured, thresholds)
    on_trial = state in (DeviceState.UNHEALTHY, DeviceState.PROBING)
    # A device on trial gets few texts, so each of them counts.
    failing = _errs(measured, thresholds) if on_trial else status.high_error_rate
    if failing or check_passed is False:
        return DeviceState.UNHEALTHY
    if on_trial and check_passed is None:
        return state
    if state is DeviceState.UNHEALTHY:
        return DeviceState.PROBING
    if state is DeviceState.DEGRADED:
        status = assess(measured, thresholds.for_recovery())
    return DeviceState.HEALTHY if status.is_healthy else DeviceState.DEGRADED


def _errs(measured: HealthMeasurements, thresholds: HealthThresholds) -> bool:
    return measured.recent_errors > thresholds.error_rate * measured.recent_texts


def _milliseconds(seconds: float | None) -> str:
    return f"{1000 * (seconds or 0.0):.3g} ms"
