"""The capabilities of a device that attention depends on, from a description of the device.

Follows the specification's capability detection, except where it errs: Volta is compute capability 7.0
and Turing 7.5, and flash attention 2 needs 8.0; versions are compared as numbers; ROCm is checked before
CUDA, because torch reports both as CUDA; and on Apple's chips the provider is MPS and not CoreML.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

__all__ = ["AMPERE", "GPUInfo", "Hardware", "detect", "fused_attention", "gpu_name", "is_built"]

OLDEST: Final = (7, 0)
"""Volta: the first for which SDPA's memory-efficient kernel is compiled and tested."""

AMPERE: Final = (8, 0)
OLDEST_ROCM: Final = (5, 0)
ROCM_KERNELS: Final = (6, 0)
"""The first version with fused attention for AMD in torch and in flash-attn."""

CDNA: Final = ("gfx90a", "gfx942", "gfx950")
ARCHITECTURES: Final = {
    (7, 0): "Volta", (7, 2): "Volta", (7, 5): "Turing", (8, 9): "Ada",
    5: "Maxwell", 6: "Pascal", 8: "Ampere", 9: "Hopper",
    10: "Blackwell", 11: "Blackwell", 12: "Blackwell",
}  # fmt: skip
"""Names by compute capability, or by its first number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """Torch's description of one device.

    Attributes:
        kind: torch's name of the device; ``cuda`` for AMD GPUs as well.
        hip: version of the ROCm that torch was built with; None without ROCm.
        capability: compute capability of a GPU.
        architecture: name of an AMD GPU's architecture, such as gfx90a.
        built_for: architectures for which this torch has kernels; empty if unknown.
        cpu_bf16: whether the processor multiplies bfloat16; emulating it is a hundred times slower.
        flash_attn: whether the package is installed and usable.
    """

    kind: Literal["cuda", "mps", "cpu"] = "cpu"
    hip: str | None = None
    capability: tuple[int, int] | None = None
    architecture: str = ""
    built_for: tuple[str, ...] = ()
    cpu_bf16: bool = False
    flash_attn: bool = False


@dataclass(frozen=True, slots=True)
class GPUInfo:
    """The capabilities of a device, in the specification's form.

    Attributes:
        is_available: whether it is an accelerator on which fused attention runs.
        provider: CUDA, ROCm, MPS or CPU.
        compute_capability: of an NVIDIA GPU.
        architecture: its name.
        flash_v2_support: whether flash attention 2 runs on it if the package is installed.
        neural_engine: whether the chip has one, as Apple's do; torch uses the GPU beside it.
    """

    is_available: bool
    provider: str = "CPU"
    compute_capability: tuple[int, int] | None = None
    architecture: str = ""
    flash_v2_support: bool = False
    neural_engine: bool = False


def detect(hardware: Hardware) -> GPUInfo:
    """Return the capabilities of a device."""
    # ROCm first: torch.cuda describes AMD GPUs as well, with a capability that is not NVIDIA's.
    if hardware.hip is not None and hardware.kind == "cuda":
        version = _version(hardware.hip)
        return GPUInfo(
            is_available=version >= OLDEST_ROCM and is_built(hardware),
            provider="ROCm",
            architecture=hardware.architecture,
            flash_v2_support=version >= ROCM_KERNELS and hardware.architecture in CDNA,
        )
    if hardware.capability is not None:
        major, minor = hardware.capability
        unknown = f"compute capability {major}.{minor}"
        return GPUInfo(
            is_available=hardware.capability >= OLDEST and is_built(hardware),
            provider="CUDA",
            compute_capability=hardware.capability,
            architecture=ARCHITECTURES.get((major, minor)) or ARCHITECTURES.get(major, unknown),
            flash_v2_support=hardware.capability >= AMPERE,
        )
    if hardware.kind == "mps":
        return GPUInfo(
            is_available=True, provider="MPS", architecture="Apple Silicon", neural_engine=True
        )
    return GPUInfo(is_available=False)


def fused_attention(hardware: Hardware) -> bool:
    """Return whether torch has a memory-efficient kernel for a GPU."""
    new_enough = hardware.hip is None or _version(hardware.hip) >= ROCM_KERNELS
    return new_enough and detect(hardware).is_available


def gpu_name(hardware: Hardware) -> str:
    """Return a GPU's name for reasons and errors."""
    device = detect(hardware)
    if device.provider == "ROCm":
        return f"ROCm {hardware.hip} on {device.architecture}"
    return f"{device.architecture} ({'.'.join(map(str, hardware.capability or ()))})"


def is_built(hardware: Hardware) -> bool:
    """Return whether this torch has kernels for a GPU: binaries of its generation, or portable code."""
    if not hardware.built_for:
        return True
    if hardware.hip is not None:
        return hardware.architecture in hardware.built_for
    for name in hardware.built_for:
        parts = re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", name)
        if parts is None:
            continue
        kind, major, minor, only = parts.groups()
        built, ours = (int(major), int(minor)), hardware.capability or (0, 0)
        # A binary runs on later chips of its generation; "compute" code on all later chips.
        fits = built <= ours and (kind == "compute" or built[0] == ours[0])
        if built == ours or (fits and only != "a"):
            return True
    return False


def _version(text: str) -> tuple[int, ...]:
    """Return the numbers of a version; as text, 10.0 would come before 5.0."""
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])
