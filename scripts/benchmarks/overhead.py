"""What the queue costs: single texts on a device that computes in no time, sent directly and routed.

Both paths run on the same fleet by turns. Each ratio is the median of ratios of two neighbouring
measurements. Throughput is measured with 64 messages in flight, latency with one.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from typing import Any

import numpy as np

from scripts.benchmarks.local import BenchFleet, bench_fleet, elapsed
from scripts.benchmarks.report import median_ratio, percentile
from sutra_tasks import embed, keys
from sutra_tasks.engines.simulated_engine import vectors_of
from sutra_tasks.settings import Settings

IN_FLIGHT = 64
SHORT = "the quick brown fox jumps over a lazy dog while seven wizards box"
MEDIUM = " ".join((SHORT.split() * 13)[:150])


def run(*, quick: bool) -> dict[str, Any]:
    """Run the benchmark."""
    messages, trips, rounds = (100, 20, 1) if quick else (300, 50, 25)
    with bench_fleet(Settings(engine="simulated"), devices=1) as fleet:
        queues = {"direct": keys.device_queue(fleet.devices[0].id), "routed": keys.EMBED_QUEUE}
        for queue in queues.values():
            _throughput(queue, SHORT, messages)
        rates: dict[str, list[float]] = {name: [] for name in queues}
        medium: dict[str, list[float]] = {name: [] for name in queues}
        latencies: dict[str, list[list[float]]] = {name: [] for name in queues}
        cpu: dict[str, list[float]] = {"router": [], "device": []}
        for turn in range(rounds):
            # The two paths are measured back to back, in an order that alternates.
            order = list(queues.items())[:: 1 if turn % 2 else -1]
            for name, queue in order:
                before = _cpu(fleet)
                rates[name].append(_throughput(queue, SHORT, messages))
                if name == "routed":
                    for process, seconds in _cpu(fleet).items():
                        cpu[process].append(1000 * (seconds - before[process]) / messages)
            for name, queue in order:
                medium[name].append(_throughput(queue, MEDIUM, messages))
            for name, queue in order:
                latencies[name].append(_latencies(queue, SHORT, trips))
    medians = {name: [percentile(one, 0.5) for one in rows] for name, rows in latencies.items()}
    return {
        "routed_over_direct": median_ratio(rates["routed"], rates["direct"]),
        "routed_medium_over_direct": median_ratio(medium["routed"], medium["direct"]),
        "routed_p50_over_direct_p50": median_ratio(medians["routed"], medians["direct"]),
        "router_cpu_ms": statistics.median(cpu["router"]),
        "device_cpu_ms": statistics.median(cpu["device"]),
        **{
            name: {
                "tasks_per_s": statistics.median(rates[name]),
                "medium_tasks_per_s": statistics.median(medium[name]),
                "p50_ms": 1000 * statistics.median(medians[name]),
                "p95_ms": 1000 * statistics.median(percentile(one, 0.95) for one in latencies[name]),
            }
            for name in queues
        },
        "rounds": rounds,
        "messages_per_round": messages,
    }


def _cpu(fleet: BenchFleet) -> dict[str, float]:
    return {"router": fleet.cpu_s("router"), "device": fleet.cpu_s(fleet.devices[0].id)}


def _throughput(queue: str, text: str, messages: int) -> float:
    expected = vectors_of([text], 384)[0]
    sent: deque[Any] = deque()
    began = time.perf_counter()
    for _ in range(messages):
        if len(sent) == IN_FLIGHT:
            _check(sent.popleft().get(timeout=60), expected)
        sent.append(embed.apply_async((text,), queue=queue))
    for result in sent:
        _check(result.get(timeout=60), expected)
    return messages / elapsed(began)


def _latencies(queue: str, text: str, trips: int) -> list[float]:
    expected = vectors_of([text], 384)[0]
    taken = []
    for _ in range(trips):
        began = time.perf_counter()
        vector = embed.apply_async((text,), queue=queue).get(timeout=60)
        taken.append(elapsed(began))
        _check(vector, expected)
    return taken


def _check(vector: Any, expected: Any) -> None:
    assert vector.shape == expected.shape, vector.shape
    assert np.allclose(vector, expected, atol=1e-6), "the fleet returned another vector"
