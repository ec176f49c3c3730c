"""Throughput of 1 to 16 simulated devices of 1,000 embeddings a second, through the real fleet.

``efficiency.n`` is throughput over n times 1,000, measured between the first and the last tenth of the
results, so that neither filling nor emptying the fleet counts. All processes share this machine's cores,
so with many devices the limit is the processor time a message of client, server, router and workers.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil

from scripts.benchmarks.local import BenchFleet, bench_fleet
from sutra_tasks import embed
from sutra_tasks.engines.simulated_engine import SPECIAL_TOKENS, vectors_of
from sutra_tasks.settings import Settings

PER_DEVICE_S: Final = 1000
WORDS: Final = 12
IN_FLIGHT_PER_DEVICE: Final = 4
EXPECTED: Final = {1: 1.0, 2: 0.95, 4: 0.90, 8: 0.85, 16: 0.75}
"""The specification's table."""


def run(*, quick: bool) -> dict[str, Any]:
    """Run the benchmark."""
    counts = (1, 2) if quick else tuple(EXPECTED)
    repeats, seconds = (1, 1.0) if quick else (3, 6.0)
    results: dict[str, Any] = {
        "efficiency": {},
        "efficiency_32": {},
        "specification": {str(n): EXPECTED[n] for n in counts},
        "throughput_per_s": {},
        "throughput_32_per_s": {},
        "cpu_s_per_message": {},
    }
    # Each fleet has a new process as its client, because a Celery app keeps its first address.
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as processes:
        for count in counts:
            rates, cpu = processes.submit(_measure, count, repeats, seconds).result()
            for texts, suffix in ((64, ""), (32, "_32")):
                rate = statistics.median(rates[texts])
                results["throughput" + suffix + "_per_s"][str(count)] = rate
                results["efficiency" + suffix][str(count)] = rate / (PER_DEVICE_S * count)
            results["cpu_s_per_message"][str(count)] = cpu
    return results


def _measure(
    count: int, repeats: int, seconds: float
) -> tuple[dict[int, list[float]], dict[str, float]]:
    """Return embeddings a second by texts in a message, and each role's seconds for a message of 64."""
    options = Settings(
        engine="simulated",
        simulated_per_token_s=1 / (PER_DEVICE_S * (WORDS + SPECIAL_TOKENS)),
    )
    with bench_fleet(options, devices=count) as fleet:
        _rate(fleet, 64, 1.0)  # warm-up
        rates = {texts: [_rate(fleet, texts, seconds) for _ in range(repeats)] for texts in (64, 32)}
        return rates, _cpu_s(fleet, seconds=seconds)


def _rate(fleet: BenchFleet, texts: int, seconds: float) -> float:
    """Return embeddings a second in the middle of a run of about ``seconds``."""
    devices = len(fleet.devices)
    messages = max(20, round(seconds * devices * PER_DEVICE_S / texts))
    batch = [" ".join([f"w{index}"] * WORDS) for index in range(texts)]
    expected = vectors_of(batch, 384)
    sent: deque[Any] = deque()
    arrived: list[float] = []

    def receive() -> None:
        vectors = sent.popleft().get(timeout=60)
        arrived.append(time.perf_counter())
        assert vectors.shape == expected.shape, vectors.shape
        assert np.abs(vectors - expected).max() < 1e-6, "the fleet returned another vector"

    in_flight = IN_FLIGHT_PER_DEVICE * devices
    for _ in range(messages):
        if len(sent) == in_flight:
            receive()
        sent.append(embed.delay(batch))
    while sent:
        receive()
    tenth = len(arrived) // 10
    first, last = tenth, len(arrived) - 1 - max(tenth, min(in_flight, len(arrived) // 4))
    return texts * (last - first) / (arrived[last] - arrived[first])


def _cpu_s(fleet: BenchFleet, *, seconds: float) -> dict[str, float]:
    """Return the processor time in seconds that each role uses for one message of 64 texts."""
    devices = [device.id for device in fleet.devices]
    messages = max(20, round(seconds * len(devices) * PER_DEVICE_S / 64))
    client = psutil.Process()

    def used() -> dict[str, float]:
        own = client.cpu_times()
        return {
            "client": own.user + own.system,
            "router": fleet.cpu_s("router"),
            "devices": sum(fleet.cpu_s(name) for name in devices),
        }

    before = used()
    _rate(fleet, 64, seconds)
    after = used()
    return {role: (after[role] - before[role]) / messages for role in before}


def plot(results: dict[str, Any], file: Path) -> None:
    """Draw both curves beside the specification's."""
    import matplotlib as mpl  # noqa: PLC0415 - only where a plot is asked for

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415 - after the choice of a backend

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, label, style in (
        ("efficiency", "64 texts a message", "o-"),
        ("efficiency_32", "32 texts a message", "s-"),
        ("specification", "specification", "k--"),
    ):
        curve = results[name]
        axes.plot([int(n) for n in curve], list(curve.values()), style, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks([int(n) for n in results["efficiency"]], results["efficiency"].keys())
    axes.set(xlabel="devices of 1,000 embeddings/s", ylabel="efficiency", ylim=(0, 1.05))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    plt.close(figure)
