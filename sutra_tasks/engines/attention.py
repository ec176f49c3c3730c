"""How a device computes attention, and in which precision: decisions about a model on a device.

Nothing here asks torch or the machine: ``encoding/attention.py`` describes both, and proves by a probe
what is decided here. The kernels and what rules each out:

* flash attention 2, the package: compute capability 8.0, or ROCm 6.0 on CDNA 2 and later; float16 or
  bfloat16; heads of 8, 16, ... 256. It takes batches without padding, whatever their lengths.
* SDPA's flash kernel: the same, and no padding mask. Padded batches take the memory-efficient kernel.
* SDPA's memory-efficient kernel: compute capability 7.0, where torch was built for it; ROCm 6.0.
* SDPA's flash kernel for CPU takes everything, masks included; so does torch's Metal kernel.
* Plain attention always works, in memory that grows with the square of a text's length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from sutra_tasks.engines.capability import AMPERE, detect, fused_attention, gpu_name, is_built

if TYPE_CHECKING:
    from sutra_tasks.engines.capability import Hardware

__all__ = [
    "AttentionCandidate",
    "AttentionChoice",
    "Implementation",
    "ModelTraits",
    "NoFaithfulAttention",
    "attention_candidates",
    "first_faithful",
    "implementation_for_padding",
]

MOST_HEAD: Final = 256
HEAD_STEP: Final = 8

LEAST_COSINE: Final = 0.9999
LEAST_COSINE_HALF: Final = 0.999
"""To plain attention in float32, of each probe. bfloat16 throughout leaves 0.9999 of six layers."""


class Implementation(StrEnum):
    """A way to compute attention; the better one first."""

    FLASH_2 = "flash_attention_2"
    SDPA_FLASH = "sdpa_flash"
    SDPA_EFFICIENT = "sdpa_efficient"
    METAL = "sdpa_metal"
    CPU_FLASH = "cpu_flash"
    PLAIN = "plain"


PATHS: Final = {
    "cuda": (
        Implementation.FLASH_2,
        Implementation.SDPA_FLASH,
        Implementation.SDPA_EFFICIENT,
        Implementation.PLAIN,
    ),
    "mps": (Implementation.METAL, Implementation.PLAIN),
    "cpu": (Implementation.CPU_FLASH, Implementation.PLAIN),
}


@dataclass(frozen=True, slots=True)
class ModelTraits:
    """What of a model decides how its attention may be computed.

    Attributes:
        head_size: width of one attention head.
        flash: its class works with flash attention 2.
        sdpa: its class works with torch's scaled dot product attention.
        position_bias: it adds a bias to attention scores, which flash kernels cannot take.
    """

    head_size: int
    flash: bool = True
    sdpa: bool = True
    position_bias: bool = False


@dataclass(frozen=True, slots=True)
class AttentionCandidate:
    """One way worth a probe.

    Attributes:
        path: how attention is computed.
        dtype: torch's name of the precision.
        ruled_out: why better ways are not tried.
        least_cosine: to plain attention in float32, below which it is given up.
        on_trial: nobody asked for its precision, so it has to be faster than float32.
    """

    path: Implementation
    dtype: str
    ruled_out: tuple[str, ...] = ()
    least_cosine: float = LEAST_COSINE
    on_trial: bool = False


@dataclass(frozen=True, slots=True)
class AttentionChoice:
    """What a device computes attention with, and why with nothing better."""

    path: str
    dtype: str
    reason: str = ""


class NoFaithfulAttention(Exception):  # noqa: N818 - told as a ModelError, which knows the model
    """No way to compute a model's attention gives the vectors it should; says why not."""


def attention_candidates(
    hardware: Hardware, model: ModelTraits, *, attention: str = "auto", dtype: str = "auto"
) -> tuple[AttentionCandidate, ...]:
    """Return the ways to try, the best first; the last is plain attention in float32.

    Args:
        hardware: the device.
        model: what has to run on it.
        attention: ``SUTRA_ATTENTION``; what cannot run is replaced by the next best.
        dtype: ``SUTRA_DTYPE``; ``auto`` is the fastest the device computes itself.
    """
    chosen, why_not_half = _precision(hardware, dtype)
    ruled_out = [why_not_half] if why_not_half else []
    if attention == "flash_attention_2" and hardware.kind != "cuda":
        ruled_out.append(f"{Implementation.FLASH_2}: there is no GPU it runs on")
    on_trial = dtype == "auto" and hardware.kind == "cpu"
    found = []
    for precision in dict.fromkeys((chosen, "float32")):
        half = precision != "float32"
        for path in PATHS[hardware.kind]:
            obstacle = _unasked(path, attention) or _obstacle(path, precision, hardware, model)
            if obstacle is None:
                floor = LEAST_COSINE_HALF if half and not on_trial else LEAST_COSINE
                found.append(
                    AttentionCandidate(path, precision, tuple(ruled_out), floor, half and on_trial)
                )
            elif precision == chosen:
                ruled_out.append(f"{path}: {obstacle}")
    return tuple(found)


def first_faithful(
    ways: Sequence[AttentionCandidate], prove: Callable[[AttentionCandidate], str | None]
) -> tuple[AttentionCandidate, AttentionChoice]:
    """Return the first way that holds, with the reasons against all better ones.

    Args:
        ways: what to try, in this order.
        prove: says why a way does not hold; None if it does.

    Raises:
        Unproven: none holds.
    """
    refused: list[str] = []
    given_up: set[str] = set()
    for way in ways:
        if way.dtype in given_up:
            continue
        reason = prove(way)
        if reason is None:
            reasons = "; ".join((*way.ruled_out, *refused))
            return way, AttentionChoice(way.path, way.dtype, reasons)
        refused.append(f"{way.path} in {way.dtype}: {reason}")
        if way.on_trial:  # one trial for a precision: a slower kernel would not make it worthwhile
            given_up.add(way.dtype)
    raise NoFaithfulAttention("; ".join(refused))


def implementation_for_padding(path: Implementation) -> Implementation:
    """Return what computes a padded batch where ``path`` was chosen."""
    return Implementation.SDPA_EFFICIENT if path is Implementation.SDPA_FLASH else path


def _precision(hardware: Hardware, asked: str) -> tuple[str, str | None]:
    """Return a precision and, if it is not the fastest, why not."""
    if asked != "auto":
        return asked, None
    if hardware.kind == "cpu":
        if hardware.cpu_bf16:
            return "bfloat16", None
        return "float32", "bfloat16: this processor does not compute it itself"
    if hardware.capability is not None:
        return "bfloat16" if hardware.capability >= AMPERE else "float16", None
    return "float32", None


def _unasked(path: Implementation, asked: str) -> str | None:
    if asked == "eager" and path is not Implementation.PLAIN:
        return "SUTRA_ATTENTION is eager"
    if asked == "sdpa" and path is Implementation.FLASH_2:
        return "SUTRA_ATTENTION is sdpa"
    return None


def _obstacle(path: Implementation, dtype: str, hardware: Hardware, model: ModelTraits) -> str | None:
    """Say why a path cannot run; None if nothing is known against it."""
    if path is Implementation.PLAIN:
        return None
    reason = _device_obstacle(path, dtype, hardware) if hardware.kind == "cuda" else None
    reason = reason or _model_obstacle(path, hardware, model)
    if reason is None and path is Implementation.FLASH_2 and not hardware.flash_attn:
        return "the package is not installed: pip install 'sutra-tasks[gpu]'"
    return reason


def _device_obstacle(path: Implementation, dtype: str, hardware: Hardware) -> str | None:
    device, this = detect(hardware), gpu_name(hardware)
    if not is_built(hardware):
        return f"this torch is built for {', '.join(hardware.built_for)}, not {this}"
    if path is not Implementation.SDPA_EFFICIENT:
        if not device.flash_v2_support:
            needed = "ROCm 6.0 on CDNA 2" if device.provider == "ROCm" else "compute capability 8.0"
            return f"needs {needed}, this is {this}"
        return "does not compute float32" if dtype == "float32" else None
    if not fused_attention(hardware):
        return f"{this} is too old for it"
    if dtype == "bfloat16" and (hardware.capability or AMPERE) < AMPERE:
        return f"bfloat16 needs compute capability 8.0, this is {this}"
    return None


def _model_obstacle(path: Implementation, hardware: Hardware, model: ModelTraits) -> str | None:
    flash = path in (Implementation.FLASH_2, Implementation.SDPA_FLASH)
    if not (model.flash if path is Implementation.FLASH_2 else model.sdpa):
        return "this model does not work with it"
    if flash and model.position_bias:
        return "does not take this model's position bias"
    if hardware.kind == "cuda" and (model.head_size < HEAD_STEP or model.head_size % HEAD_STEP):
        return f"heads of {model.head_size} are no multiple of {HEAD_STEP}"
    if flash and model.head_size > MOST_HEAD:
        return f"heads of {model.head_size} are over {MOST_HEAD}"
    return None
