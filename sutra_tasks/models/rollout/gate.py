"""Whether a version of a model may serve: good enough, and the same on every device.

A pure decision over what was measured when it was made and what the devices say that have loaded it
aside. Whatever is not known counts against it.
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
"""The name in a manifest's metrics of what each field of a :class:`Thresholds` bounds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """The least quality with which a version may serve, on held-out text; None asks for nothing.

    Attributes:
        cosine: mean cosine to the projected teacher.
        spearman: rank correlation of pairwise similarities with the teacher's.
        ndcg: NDCG@10 on labelled pairs, over the teacher's.
    """

    cosine: float | None = None
    spearman: float | None = None
    ndcg: float | None = None


@dataclass(frozen=True, slots=True)
class DeviceReadiness:
    """What one device says of the version.

    Attributes:
        device: its id.
        state: ``waiting`` until it has tried; ``ready`` if the version is in its memory, and gives there
            the vectors that its manifest says.
        reason: why it failed.
    """

    device: str
    state: Literal["waiting", "ready", "failed"]
    reason: str = ""


@dataclass(frozen=True, slots=True)
class GateDecision:
    """``pending`` is asked again; ``reason`` names devices and numbers."""

    state: Literal["passed", "pending", "refused"]
    reason: str


def decide(
    manifest: Manifest,
    floor: Thresholds,
    devices: Sequence[DeviceReadiness],
    *,
    now: float,
    deadline: float,
) -> GateDecision:
    """Say whether a version may serve.

    Args:
        manifest: the version's.
        floor: the least quality.
        devices: every live device, or those that live and were asked.
        now: by the clock of ``deadline``.
        deadline: until when devices may take their time.
    """
    against = _under(manifest, floor)
    against += [f"{one.device}: {one.reason or 'failed'}" for one in devices if one.state == "failed"]
    if against:
        return GateDecision("refused", "; ".join(against))
    awaited = ", ".join(one.device for one in devices if one.state == "waiting")
    if devices and not awaited:
        return GateDecision("passed", f"the same on {len(devices)} devices")
    if now < deadline:
        return GateDecision("pending", f"waiting for {awaited or 'a live device'}")
    return GateDecision(
        "refused", f"no answer in time from {awaited}" if awaited else "no device is live"
    )


def _under(manifest: Manifest, floor: Thresholds) -> list[str]:
    found = []
    for option in fields(floor):
        least, name = getattr(floor, option.name), METRICS[option.name]
        if least is None:
            continue
        value = manifest.metrics.get(name)
        if not isinstance(value, int | float):
            found.append(f"{name} was not measured, and {least:g} is the least")
        elif not value >= least:
            found.append(f"{name} is {value:.4f}, under the {least:g} that is the least")
    return found
