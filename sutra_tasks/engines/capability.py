"""What a device offers attention: the specification's capability detection, on a description of one.

Where the specification errs, this departs from it: Volta is compute capability 7.0 and Turing 7.5, flash
attention 2 begins at 8.0; versions compare as numbers; a ROCm build of torch answers as CUDA does, so it
is asked for first; and the provider is what computes, which on Apple's chips is MPS and not CoreML.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

__all__ = ["AMPERE", "GPUInfo", "Hardware", "detect", "fused_attention", "gpu_name", "is_built"]

OLDEST: Final = (7, 0)
"""Volta: the first that SDPA's memory-efficient kernel is compiled and tested for."""

AMPERE: Final = (8, 0)
OLDEST_ROCM: Final = (5, 0)
ROCM_KERNELS: Final = (6, 0)
"""From here on torch has fused attention for AMD, and so has flash-attn."""

CDNA: Final = ("gfx90a", "gfx942", "gfx950")
ARCHITECTURES: Final = {
    (7, 0): "Volta", (7, 2): "Volta", (7, 5): "Turing", (8, 9): "Ada",
    5: "Maxwell", 6: "Pascal", 8: "Ampere", 9: "Hopper",
    10: "Blackwell", 11: "Blackwell", 12: "Blackwell",
}  # fmt: skip
"""By compute capability, else by its first number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What torch says of one device.

    Attributes:
        kind: torch's name of it; an AMD GPU is ``cuda`` too.
        hip: version of the ROCm that torch was built with; None if it was not.
        capability: compute capability of a GPU.
        architecture: an AMD GPU's own name for it, as gfx90a.
        built_for: architectures this build of torch has kernels for; empty if it does not say.
        cpu_bf16: the processor multiplies bfloat16 itself; others emulate it, a hundred times slower.
        flash_attn: the package is installed and can be used.
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
    """What a device offers attention, as the specification asks.

    Attributes:
        is_available: an accelerator that fused attention runs on.
        provider: what computes: CUDA, ROCm, MPS or CPU.
        compute_capability: of an NVIDIA GPU.
        architecture: its name.
        flash_v2_support: flash attention 2 runs on it, given the package.
        neural_engine: the chip has one, as Apple's do; torch computes on the GPU beside it.
    """

    is_available: bool
    provider: str = "CPU"
    compute_capability: tuple[int, int] | None = None
    architecture: str = ""
    flash_v2_support: bool = False
    neural_engine: bool = False


def detect(hardware: Hardware) -> GPUInfo:
    """Return the specification's facts about a device."""
    # A ROCm build of torch answers through torch.cuda, with a capability that is not NVIDIA's.
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
    """Whether torch has a memory-efficient kernel for a GPU."""
    new_enough = hardware.hip is None or _version(hardware.hip) >= ROCM_KERNELS
    return new_enough and detect(hardware).is_available


def gpu_name(hardware: Hardware) -> str:
    """Return how to call a GPU in a reason."""
    device = detect(hardware)
    if device.provider == "ROCm":
        return f"ROCm {hardware.hip} on {device.architecture}"
    return f"{device.architecture} ({'.'.join(map(str, hardware.capability or ()))})"


def is_built(hardware: Hardware) -> bool:
    """Whether this torch has kernels for the GPU: binaries of its generation, or code to compile."""
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
        # A binary runs on later chips of its generation; code for "compute" on all later ones.
        fits = built <= ours and (kind == "compute" or built[0] == ours[0])
        if built == ours or (fits and only != "a"):
            return True
    return False


def _version(text: str) -> tuple[int, ...]:
    """Return a version's numbers: as text, 10.0 would come before 5.0."""
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])
