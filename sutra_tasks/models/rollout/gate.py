"""Decides whether a version of a model may serve: its quality is sufficient, and all devices agree.

The decision depends only on the measurements in its manifest and on the reports of the devices that
loaded it. A missing measurement or report counts against the version.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from sutra_tasks.models.registry.manifest import Manifest

__all__ = ["METRICS", "DeviceReadiness", "GateDecision", "Thresholds", "decide"]

METRICS: Final = {
    "cosine": "cosine_similarity",
    "spearman": "spearman",
    "ndcg": "ndcg_preservation",
}
"""The metric in a manifest that each field of :class:`Thresholds` bounds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """The lowest quality on held-out text with which a version may serve; None: no requirement.

    Attributes:
        cosine: mean cosine to the projected teacher.
        spearman: rank correlation of pairwise similarities with the teacher's.
        ndcg: NDCG@10 on labelled pairs, divided by the teacher's.
    """

    cosine: float | None = None
    spearman: float | None = None
    ndcg: float | None = None


@dataclass(frozen=True, slots=True)
class DeviceReadiness:
    """One device's report about the version.

    Attributes:
        device: id of the device.
        state: ``waiting`` until the device has tried to load the version; ``ready`` if the version is in
            its memory and gives the vectors of its manifest; else ``failed``.
        reason: why it failed.
    """

    device: str
    state: Literal["waiting", "ready", "failed"]
    reason: str = ""


@dataclass(frozen=True, slots=True)
class GateDecision:
    """Whether a version may serve.

    Attributes:
        state: ``pending`` means that the caller decides again later.
        reason: names devices and figures.
    """

    state: Literal["passed", "pending", "refused"]
    reason: str


def decide(
    manifest: Manifest,
    thresholds: Thresholds,
    devices: Sequence[DeviceReadiness],
    *,
    now: float,
    deadline: float,
) -> GateDecision:
    """Return whether a version may serve.

    Args:
        manifest: of the version.
        thresholds: the lowest quality.
        devices: the reports of all live devices, and of devices that died after they were asked.
        now: by the clock of ``deadline``.
        deadline: until when devices may load the version.
    """
    reasons = _below(manifest, thresholds)
    reasons += [f"{one.device}: {one.reason or 'failed'}" for one in devices if one.state == "failed"]
    if reasons:
        return GateDecision("refused", "; ".join(reasons))
    awaited = ", ".join(one.device for one in devices if one.state == "waiting")
    if devices and not awaited:
        return GateDecision("passed", f"the same on {len(devices)} devices")
    if now < deadline:
        return GateDecision("pending", f"waiting for {awaited or 'a live device'}")
    reason = f"no answer in time from {awaited}" if awaited else "no device is live"
    return GateDecision("refused", reason)


def _below(manifest: Manifest, thresholds: Thresholds) -> list[str]:
    """Return a reason for each metric that is below its threshold, or was not measured."""
    found = []
    for option in fields(thresholds):
        threshold, name = getattr(thresholds, option.name), METRICS[option.name]
        if threshold is None:
            continue
        value = manifest.metrics.get(name)
        if not isinstance(value, int | float):
            found.append(f"{name} was not measured, and {threshold:g} is the least")
        elif not value >= threshold:
            found.append(f"{name} is {value:.4f}, under the {threshold:g} that is the least")
    return found
