"""How much of a device's memory is in use: of a GPU, or of what the system allows this process.

Memory of a GPU counts for all processes that use it, without what torch of this process keeps for reuse:
its cache grows to the largest batch and stays, which is no pressure. Nothing here imports torch or
raises.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil

__all__ = ["UNKNOWN", "Memory", "device_memory", "process_memory"]


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of one device; None: not known. ``source`` names the library or system that was asked."""

    used_bytes: int | None
    total_bytes: int | None
    source: str

    @property
    def share(self) -> float | None:
        """Return the share in use, 0 to 1."""
        if self.used_bytes is None or not self.total_bytes:
            return None
        return min(1.0, max(0.0, self.used_bytes / self.total_bytes))


UNKNOWN: Final = Memory(None, None, "none")


def device_memory(torch_device: str) -> Memory:
    """Return the memory of ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.

    Takes milliseconds where NVIDIA's library has to start. The memory of a GPU is known only where torch
    is loaded: only then does this process use one.
    """
    kind = torch_device.partition(":")[0]
    torch = sys.modules.get("torch")
    try:
        if kind == "cpu":
            return process_memory()
        if kind == "cuda" and torch is not None:
            return _cuda_memory(torch, torch_device)
        if kind == "mps" and torch is not None:
            used, total = torch.mps.current_allocated_memory(), torch.mps.recommended_max_memory()
            return Memory(used, total, "torch")
    except Exception:  # noqa: BLE001 - a driver that does not answer must not end a heartbeat
        return UNKNOWN
    return UNKNOWN


def process_memory(root: Path = Path("/")) -> Memory:
    """Return this process's resident memory, against the machine's memory or its control group's limit.

    Args:
        root: the folder with ``proc`` and ``sys``, for the limit.
    """
    used, total = psutil.Process().memory_info().rss, psutil.virtual_memory().total
    limit = _cgroup_limit(root)
    if limit is not None and limit < total:  # version 1 says "none" with a number no machine has
        return Memory(used, limit, "cgroup")
    return Memory(used, total, "process")


def _cuda_memory(torch: Any, device: str) -> Memory:
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    # ROCm answers through torch.cuda as well; NVIDIA's library does not know its devices.
    if torch.version.hip is None:
        try:
            # By UUID, because CUDA_VISIBLE_DEVICES may have selected and reordered the devices.
            used, total = _nvml_memory(str(torch.cuda.get_device_properties(device).uuid))
            return Memory(used - idle, total, "nvml")
        except Exception:  # noqa: BLE001, S110 - no package, library or permission: torch is asked
            pass
    free, total = torch.cuda.mem_get_info(device)
    return Memory(total - free - idle, total, "torch")


def _nvml_memory(uuid: str) -> tuple[int, int]:
    import pynvml  # noqa: PLC0415 - an optional extra

    pynvml.nvmlInit()
    try:
        try:
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        except pynvml.NVMLError:
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")  # a slice of a GPU
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        return memory.used, memory.total
    finally:
        pynvml.nvmlShutdown()


def _cgroup_limit(root: Path) -> int | None:
    """Return the lowest limit of this process's control groups (version 2 or 1) and of their parents.

    psutil does not know it.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            top, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        # In a container the path may be the host's, of which only the top is mounted here.
        group = top / path.lstrip("/")
        folders = (folder for folder in (group, *group.parents) if folder.is_relative_to(top))
        found += [_limit(folder / name) for folder in folders]
    return min((limit for limit in found if limit is not None), default=None)


def _limit(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return None
