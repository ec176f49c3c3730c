"""How much faster a student is than its teacher, and whether this machine trains in half precision."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch

__all__ = ["has_fast_bfloat16", "speed_ratio"]

LEAST_S: Final = 0.05
"""A clock says little of less: a student this quick does its texts several times a turn."""


def speed_ratio(
    teacher_encode: Callable[[Sequence[str]], object],
    student_encode: Callable[[Sequence[str]], object],
    texts: Sequence[str],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Return how many times as many texts a second the student does: the median of pairwise ratios.

    They take turns, so that what else the machine does meets both; the first turn of each warms up
    and is not counted. Both are to run in the same engine, with the same precision and threads.

    Args:
        teacher_encode: computes the vectors of texts.
        student_encode: the same by the student.
        texts: as they come in practice: speed depends on their lengths.
        repeats: turns of each, one at least.
        clock: seconds.

    Raises:
        ValueError: there are no texts, or no turns.
    """
    if not texts or repeats < 1:
        raise ValueError("nothing to measure")
    teacher_encode(texts)
    warm = _seconds(student_encode, texts, 1, clock)
    times = 1 if warm >= LEAST_S else min(100, int(LEAST_S / max(warm, LEAST_S / 100)) + 1)
    ratios = []
    for _ in range(repeats):
        theirs = _seconds(teacher_encode, texts, 1, clock)
        ratios.append(theirs / _seconds(student_encode, texts, times, clock))
    return statistics.median(ratios)


def has_fast_bfloat16(device: torch.device) -> bool:
    """Tell whether training steps are faster in bfloat16: twice as fast where a processor has it."""
    if device.type != "cpu":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    # Emulated, as on older processors, it is slower than float32.
    known: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def _seconds(
    encode: Callable[[Sequence[str]], object],
    texts: Sequence[str],
    times: int,
    clock: Callable[[], float],
) -> float:
    """Return the seconds of one pass over the texts, the mean of ``times``."""
    began = clock()
    for _ in range(times):
        encode(texts)
    return (clock() - began) / times
