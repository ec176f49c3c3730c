"""Decides which attention implementation a model uses on a device, and in which precision.

Pure decisions: ``torch_engine/introspection.py`` describes the device and the model, and
``torch_engine/forward_pass.py`` tries what is decided here. The requirements of each implementation:

* flash attention 2, the package: compute capability 8.0, or ROCm 6.0 on CDNA 2 and later; float16 or
  bfloat16; heads of 8, 16, ... 256. Its batches need no padding.
* SDPA's flash kernel: the same, and no padding mask. Padded batches use the memory-efficient kernel.
* SDPA's memory-efficient kernel: compute capability 7.0, and a torch built for it; ROCm 6.0.
* SDPA's flash kernel for CPU: none; it supports masks. The same for torch's Metal kernel.
* Plain attention: none, but its memory grows with the square of a text's length.
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
"""The lowest cosine of a probe's vectors to those of plain attention in float32. With all computing in
bfloat16 it is 0.9999 with six layers."""


class Implementation(StrEnum):
    """An implementation of attention; the fastest first."""

    FLASH_2 = "flash_attention_2"
    SDPA_FLASH = "sdpa_flash"
    SDPA_EFFICIENT = "sdpa_efficient"
    METAL = "sdpa_metal"
    CPU_FLASH = "cpu_flash"
    PLAIN = "plain"


IMPLEMENTATIONS: Final = {
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
    """The properties of a model that decide which implementations can compute it.

    Attributes:
        head_size: width of one attention head.
        flash: whether its class supports flash attention 2.
        sdpa: whether its class supports torch's scaled dot product attention (SDPA).
        position_bias: whether it adds a bias to attention scores, which flash kernels do not support.
    """

    head_size: int
    flash: bool = True
    sdpa: bool = True
    position_bias: bool = False


@dataclass(frozen=True, slots=True)
class AttentionCandidate:
    """An implementation and a precision to try.

    Attributes:
        implementation: of attention.
        dtype: torch's name of the precision.
        ruled_out: the reasons why faster ones are not tried.
        least_cosine: to plain attention in float32; with a lower one the candidate fails.
        on_trial: whether it has to be faster than float32, because its precision was not configured.
    """

    implementation: Implementation
    dtype: str
    ruled_out: tuple[str, ...] = ()
    least_cosine: float = LEAST_COSINE
    on_trial: bool = False


@dataclass(frozen=True, slots=True)
class AttentionChoice:
    """The implementation and precision that a device uses.

    Attributes:
        implementation: its name.
        dtype: torch's name of the precision.
        reason: why no faster one is used.
    """

    implementation: str
    dtype: str
    reason: str = ""


class NoFaithfulAttention(Exception):  # noqa: N818 - raised again as a ModelError with the model's name
    """Every candidate failed; the message has the reasons."""


def attention_candidates(
    hardware: Hardware, model: ModelTraits, *, attention: str = "auto", dtype: str = "auto"
) -> tuple[AttentionCandidate, ...]:
    """Return the candidates to try, the fastest first; the last is plain attention in float32.

    Args:
        hardware: the device.
        model: the model.
        attention: ``SUTRA_ATTENTION``; an implementation that cannot run is replaced by the next.
        dtype: ``SUTRA_DTYPE``; ``auto`` is the fastest that the device does not emulate.
    """
    chosen, why_not_half = _precision(hardware, dtype)
    ruled_out = [why_not_half] if why_not_half else []
    if attention == "flash_attention_2" and hardware.kind != "cuda":
        ruled_out.append(f"{Implementation.FLASH_2}: there is no GPU it runs on")
    on_trial = dtype == "auto" and hardware.kind == "cpu"
    found = []
    for precision in dict.fromkeys((chosen, "float32")):
        half = precision != "float32"
        for kernel in IMPLEMENTATIONS[hardware.kind]:
            obstacle = _excluded(kernel, attention) or _obstacle(kernel, precision, hardware, model)
            if obstacle is None:
                least_cosine = LEAST_COSINE_HALF if half and not on_trial else LEAST_COSINE
                found.append(
                    AttentionCandidate(
                        kernel, precision, tuple(ruled_out), least_cosine, half and on_trial
                    )
                )
            elif precision == chosen:
                ruled_out.append(f"{kernel}: {obstacle}")
    return tuple(found)


def first_faithful(
    candidates: Sequence[AttentionCandidate], fault: Callable[[AttentionCandidate], str | None]
) -> tuple[AttentionCandidate, AttentionChoice]:
    """Return the first candidate that passes its probe, and the reasons against all faster ones.

    Args:
        candidates: in the order in which they are tried.
        fault: probes a candidate; returns why it fails, or None if it passes.

    Raises:
        NoFaithfulAttention: every candidate fails.
    """
    refused: list[str] = []
    given_up: set[str] = set()
    for one in candidates:
        if one.dtype in given_up:
            continue
        reason = fault(one)
        if reason is None:
            reasons = "; ".join((*one.ruled_out, *refused))
            return one, AttentionChoice(one.implementation, one.dtype, reasons)
        refused.append(f"{one.implementation} in {one.dtype}: {reason}")
        if one.on_trial:  # one trial for each precision: a slower kernel would not be faster in it
            given_up.add(one.dtype)
    raise NoFaithfulAttention("; ".join(refused))


def implementation_for_padding(chosen: Implementation) -> Implementation:
    """Return the implementation for padded batches, given the one that was chosen."""
    return Implementation.SDPA_EFFICIENT if chosen is Implementation.SDPA_FLASH else chosen


def _precision(hardware: Hardware, asked: str) -> tuple[str, str | None]:
    """Return a precision, and the reason if it is not the fastest."""
    if asked != "auto":
        return asked, None
    if hardware.kind == "cpu":
        if hardware.cpu_bf16:
            return "bfloat16", None
        return "float32", "bfloat16: this processor does not compute it itself"
    if hardware.capability is not None:
        return "bfloat16" if hardware.capability >= AMPERE else "float16", None
    return "float32", None


def _excluded(kernel: Implementation, asked: str) -> str | None:
    if asked == "eager" and kernel is not Implementation.PLAIN:
        return "SUTRA_ATTENTION is eager"
    if asked == "sdpa" and kernel is Implementation.FLASH_2:
        return "SUTRA_ATTENTION is sdpa"
    return None


def _obstacle(kernel: Implementation, dtype: str, hardware: Hardware, model: ModelTraits) -> str | None:
    """Return why an implementation cannot run; None if nothing is known against it."""
    if kernel is Implementation.PLAIN:
        return None
    reason = _device_obstacle(kernel, dtype, hardware) if hardware.kind == "cuda" else None
    reason = reason or _model_obstacle(kernel, hardware, model)
    if reason is None and kernel is Implementation.FLASH_2 and not hardware.flash_attn:
        return "the package is not installed: pip install 'sutra-tasks[gpu]'"
    return reason


def _device_obstacle(kernel: Implementation, dtype: str, hardware: Hardware) -> str | None:
    device, this = detect(hardware), gpu_name(hardware)
    if not is_built(hardware):
        return f"this torch is built for {', '.join(hardware.built_for)}, not {this}"
    if kernel is not Implementation.SDPA_EFFICIENT:
        if not device.flash_v2_support:
            needed = "ROCm 6.0 on CDNA 2" if device.provider == "ROCm" else "compute capability 8.0"
            return f"needs {needed}, this is {this}"
        return "does not compute float32" if dtype == "float32" else None
    if not fused_attention(hardware):
        return f"{this} is too old for it"
    if dtype == "bfloat16" and (hardware.capability or AMPERE) < AMPERE:
        return f"bfloat16 needs compute capability 8.0, this is {this}"
    return None


def _model_obstacle(kernel: Implementation, hardware: Hardware, model: ModelTraits) -> str | None:
    flash = kernel in (Implementation.FLASH_2, Implementation.SDPA_FLASH)
    if not (model.flash if kernel is Implementation.FLASH_2 else model.sdpa):
        return "this model does not work with it"
    if flash and model.position_bias:
        return "does not take this model's position bias"
    if hardware.kind == "cuda" and (model.head_size < HEAD_STEP or model.head_size % HEAD_STEP):
        return f"heads of {model.head_size} are no multiple of {HEAD_STEP}"
    if flash and model.head_size > MOST_HEAD:
        return f"heads of {model.head_size} are over {MOST_HEAD}"
    return None
