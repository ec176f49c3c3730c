"""The load of this machine: of its processors, its memory, and this worker's GPU if it has one."""

from __future__ import annotations

import sys

import psutil

from sutra_tasks.streaming.backpressure import system_load

__all__ = ["machine_load"]


def machine_load(torch_device: str, memory_share: float | None) -> float:
    """Return :func:`system_load` of this machine since the last call.

    Args:
        torch_device: where this worker computes, by PyTorch's name.
        memory_share: used share of the device's memory, 0 to 1; None if it is not known.
    """
    memory = psutil.virtual_memory().percent / 100
    return system_load(
        psutil.cpu_percent() / 100, max(memory, memory_share or 0.0), _gpu_load(torch_device)
    )


def _gpu_load(torch_device: str) -> float | None:
    torch = sys.modules.get("torch")
    if not torch_device.startswith("cuda") or torch is None:
        return None
    try:
        return float(torch.cuda.utilization(torch_device)) / 100
    except Exception:  # noqa: BLE001 - the driver does not answer: count the other resources
        return None
