"""Results as a table on screen and as one JSON document."""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sutra_tasks.host.hardware import count_cores

MOST_SHOWN = 8
PACKAGES = ("sutra-tasks", "celery", "kombu", "redis", "numpy", "torch", "sentence-transformers")


def document(name: str, results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the report of one benchmark: its results, the machine and the versions."""
    return {"name": name, "machine": machine(), "versions": versions(), "results": results}


def machine() -> dict[str, Any]:
    """Describe the processor; the host's name stays out."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    return {"cpu": cpu, "cores": count_cores(), "system": platform.system()}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that are measured."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        found[package] = importlib.metadata.version(package)
    return found


def show(name: str, results: Mapping[str, Any]) -> None:
    """Print every number by its name."""
    table = Table(title=f"bench {name}", box=None, header_style="bold")
    table.add_column("result")
    table.add_column("value", justify="right")
    for key, value in _flat(results):
        table.add_row(key, f"{value:,.3f}" if isinstance(value, float) else str(value))
    Console().print(table)


def _flat(results: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in results.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and len(value) > MOST_SHOWN:
            yield prefix + key, f"{len(value)} values"
        else:
            yield prefix + key, value


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which ``share`` of ``values`` lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Return the median of the pairwise ratios; the values of a pair were measured side by side."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))
