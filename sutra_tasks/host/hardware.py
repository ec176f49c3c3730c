"""Finds GPUs and cores, and decides which device workers of this machine to start."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from celery.utils.sysinfo import cpu_budget

from sutra_tasks.errors import SettingsError

__all__ = ["DeviceSpec", "count_cores", "count_gpus", "host_name", "plan_devices", "visible_gpus"]

MOST_HOST_CHARS: Final = 40

MOST_CPU_WORKERS: Final = 8
"""Each CPU worker has a copy of the model in memory; further cores become threads of the workers."""

DEFAULT_SIMULATED: Final = 2
"""Device workers with the simulated engine, if no number is given."""


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """One device worker to start, and the environment variables that it needs."""

    id: str
    environ: Mapping[str, str]


def visible_gpus(count: int, cuda_visible_devices: str | None) -> tuple[str, ...]:
    """Return the names by which CUDA knows the GPUs that this process may use.

    Args:
        count: GPUs of the machine.
        cuda_visible_devices: the environment variable; None: not set.
    """
    if cuda_visible_devices is None:
        return tuple(str(index) for index in range(count))
    return tuple(name.strip() for name in cuda_visible_devices.split(",") if name.strip())[:count]


def host_name(name: str) -> str:
    """Return the name of a machine as the names of devices have it; other names give other results.

    Names of pods are long and differ in their last characters: what is cut is told by a hash.
    """
    cleaned = re.sub(r"[^A-Za-z0-9-]+", "-", name).strip("-")
    if cleaned and len(cleaned) <= MOST_HOST_CHARS:
        return cleaned
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{cleaned[: MOST_HOST_CHARS - 9].strip('-') or 'host'}-{digest}"


def plan_devices(
    *,
    host: str,
    engine: str,
    gpus: tuple[str, ...],
    cores: int,
    count: int | None,
    replicas: int = 1,
    number: int = 1,
) -> tuple[DeviceSpec, ...]:
    """Decide the device workers of one machine: for each GPU, else for each group of cores.

    Args:
        host: name of the machine; device ids begin with it.
        engine: ``SUTRA_ENGINE``.
        gpus: names of its GPUs.
        cores: how many cores this process may use.
        count: how many devices; None: all of them.
        replicas: workers on each device, named ``gpu0-1``, ``gpu0-2`` and so on; they share its memory,
            or its cores, evenly.
        number: of the fleet on this machine; the names of a second one say so.

    Raises:
        SettingsError: ``count`` is more than there are GPUs, or one of the numbers is less than 1.
    """
    host = host_name(host) + (f"-{number}" if number > 1 else "")
    for option, value in (("--devices", count), ("--replicas-per-device", replicas)):
        if value is not None and value < 1:
            raise SettingsError(option, str(value), "must be 1 or more")
    if engine == "simulated":
        devices = [DeviceSpec(f"{host}-sim{index}", {}) for index in range(count or DEFAULT_SIMULATED)]
    elif gpus:
        if count is not None and count > len(gpus):
            raise SettingsError("--devices", str(count), f"this machine has {len(gpus)} GPUs")
        devices = [_gpu(f"{host}-gpu{at}", name, replicas) for at, name in enumerate(gpus[:count])]
    else:
        workers = count or min(cores, MOST_CPU_WORKERS)
        devices = [_cpu(f"{host}-cpu{at}", cores // (workers * replicas)) for at in range(workers)]
    if replicas == 1:
        return tuple(devices)
    return tuple(
        DeviceSpec(f"{device.id}-{number}", device.environ)
        for device in devices
        for number in range(1, replicas + 1)
    )


def _gpu(device_id: str, name: str, replicas: int) -> DeviceSpec:
    environ = {"CUDA_VISIBLE_DEVICES": name, "SUTRA_TORCH_DEVICE": "cuda"}
    if replicas > 1:
        environ["SUTRA_GPU_MEMORY_SHARE"] = f"{1 / replicas:.4f}"
    return DeviceSpec(device_id, environ)


def _cpu(device_id: str, cores: int) -> DeviceSpec:
    # With more threads than cores torch computes 30 to 50 times slower.
    threads = str(max(1, cores))
    return DeviceSpec(
        device_id,
        {
            "SUTRA_TORCH_DEVICE": "cpu",
            "SUTRA_TORCH_THREADS": threads,
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "TOKENIZERS_PARALLELISM": "false",
        },
    )


def count_cores() -> int:
    """Return how many cores this process may keep busy: by its affinity and its control groups' quota.

    A quota of a core and a half counts as two.
    """
    return int(cpu_budget().count)


def count_gpus() -> int:
    """Return the NVIDIA GPUs of this machine: by NVML, else by torch, else none."""
    try:
        import pynvml  # noqa: PLC0415 - an optional extra

        pynvml.nvmlInit()
        try:
            return int(pynvml.nvmlDeviceGetCount())
        finally:
            pynvml.nvmlShutdown()
    except Exception:  # noqa: BLE001 - no package, no driver, no permission: all mean "ask torch"
        if not Path("/proc/driver/nvidia").exists():  # torch takes seconds to import
            return 0
    try:
        import torch  # noqa: PLC0415 - only where there is a driver to ask about

        return int(torch.cuda.device_count())
    except ImportError:
        return 0
