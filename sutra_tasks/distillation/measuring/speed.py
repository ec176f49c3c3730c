"""Measures how much faster a student is than its teacher."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Final

__all__ = ["speed_ratio"]

LEAST_S: Final = 0.05
"""Shortest time that a clock measures well: a faster student embeds its texts several times a turn."""


def speed_ratio(
    teacher_encode: Callable[[Sequence[str]], object],
    student_encode: Callable[[Sequence[str]], object],
    texts: Sequence[str],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Return the student's texts a second divided by the teacher's: the median of the turns.

    Teacher and student take turns, so that other work on the machine affects both. The first turn of
    each warms it up and is not counted. Both should use the same engine, precision and threads.

    Args:
        teacher_encode: computes the teacher's vectors of texts.
        student_encode: computes the student's vectors of texts.
        texts: of realistic lengths, on which the speed depends.
        repeats: turns of each, one at least.
        clock: seconds.

    Raises:
        ValueError: there are no texts, or no turns.
    """
    if not texts or repeats < 1:
        raise ValueError("nothing to measure")
    teacher_encode(texts)
    warm_up_s = _seconds(student_encode, texts, 1, clock)
    times = 1 if warm_up_s >= LEAST_S else min(100, int(LEAST_S / max(warm_up_s, LEAST_S / 100)) + 1)
    ratios = []
    for _ in range(repeats):
        teacher_s = _seconds(teacher_encode, texts, 1, clock)
        ratios.append(teacher_s / _seconds(student_encode, texts, times, clock))
    return statistics.median(ratios)


def _seconds(
    encode: Callable[[Sequence[str]], object],
    texts: Sequence[str],
    times: int,
    clock: Callable[[], float],
) -> float:
    """Return the mean seconds of ``times`` passes over the texts."""
    began = clock()
    for _ in range(times):
        encode(texts)
    return (clock() - began) / times
