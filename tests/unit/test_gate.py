"""Which versions may serve: a table of what was measured, what devices say, and the time left."""

from dataclasses import replace
from typing import Any

import pytest

from sutra_tasks.models.registry.manifest import Manifest
from sutra_tasks.models.rollout.gate import METRICS, DeviceReadiness, Thresholds, decide

MADE = Manifest(
    name="short", version=3, created_at=0, space="s:2", width=2, golden="{}", files={}, bytes=0,
    metrics={"cosine_similarity": 0.93, "spearman": 0.9, "ndcg_preservation": None},
)  # fmt: skip
READY, ALSO = DeviceReadiness("gpu-0", "ready"), DeviceReadiness("gpu-1", "ready")
WAITING = DeviceReadiness("gpu-2", "waiting")
FAILED = DeviceReadiness("gpu-3", "failed", "out of memory")
APART = DeviceReadiness("gpu-4", "failed", "its vectors differ: cosine 0.61")
ANY = Thresholds()

TABLE: list[tuple[Thresholds, list[DeviceReadiness], float, str, list[str]]] = [
    # Devices.
    (ANY, [READY], 0, "passed", ["1 devices"]),
    (ANY, [READY, ALSO], 99, "passed", ["2 devices"]),
    (ANY, [READY, WAITING], 9.9, "pending", ["gpu-2"]),
    (ANY, [READY, WAITING], 10, "refused", ["no answer in time", "gpu-2"]),
    (ANY, [], 0, "pending", ["a live device"]),
    (ANY, [], 10, "refused", ["no device is live"]),
    (ANY, [READY, FAILED], 0, "refused", ["gpu-3: out of memory"]),
    (ANY, [WAITING, FAILED], 0, "refused", ["gpu-3"]),
    (ANY, [DeviceReadiness("gpu-5", "failed")], 0, "refused", ["gpu-5: failed"]),
    (ANY, [READY, APART], 0, "refused", ["gpu-4", "cosine 0.61"]),
    (ANY, [APART, FAILED], 0, "refused", ["gpu-4", "gpu-3"]),
    # Quality.
    (Thresholds(cosine=0.93), [READY], 0, "passed", []),
    (Thresholds(cosine=0.94), [READY], 0, "refused", ["cosine_similarity is 0.9300, under the 0.94"]),
    (Thresholds(cosine=0.94, spearman=0.91), [READY], 0, "refused", ["cosine_similarity", "spearman"]),
    (Thresholds(spearman=0.91), [], 0, "refused", ["spearman is 0.9000"]),
    (Thresholds(ndcg=0.95), [READY], 0, "refused", ["ndcg_preservation was not measured", "0.95"]),
    (Thresholds(ndcg=0.0), [READY], 0, "refused", ["not measured"]),
    (Thresholds(cosine=0.99), [FAILED], 0, "refused", ["cosine_similarity", "gpu-3"]),
]


@pytest.mark.parametrize(("thresholds", "devices", "now", "state", "said"), TABLE)
def test_a_version_serves_if_it_is_good_and_the_same_everywhere(
    thresholds: Thresholds, devices: list[DeviceReadiness], now: float, state: str, said: list[str]
) -> None:
    verdict = decide(MADE, thresholds, devices, now=now, deadline=10)
    assert verdict.state == state
    for part in said:
        assert part in verdict.reason


def test_what_passes_blames_nobody() -> None:
    said = decide(MADE, ANY, [READY, APART, FAILED, WAITING], now=0, deadline=1).reason
    assert "gpu-0" not in said
    assert "gpu-2" not in said


@pytest.mark.parametrize("value", [float("nan"), "0.99", None, [0.99]])
def test_what_is_no_number_is_under_every_floor(value: Any) -> None:
    made = replace(MADE, metrics={"spearman": value})
    assert decide(made, Thresholds(spearman=0.1), [READY], now=0, deadline=1).state == "refused"


def test_every_floor_has_a_metric() -> None:
    assert set(METRICS) == set(Thresholds.__dataclass_fields__)
