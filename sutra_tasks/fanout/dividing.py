"""How the rows of a call are divided into parts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from sutra_tasks.routing.snapshot import Fleet

__all__ = ["parts_for", "parts_of"]

LEAST_PART_S: Final = 0.02
"""Seconds of work that a part has at least, because its message costs a few milliseconds."""

PARTS_PER_DEVICE: Final = 2
"""More parts even out devices of different speeds, but each costs some 4 ms of processor time: with four
for each of four devices, 64 chunks of 10 ms took 15 ms longer."""


def parts_for(fleet: Fleet, tokens: Sequence[int], *, batch_tokens: int) -> list[range]:
    """Divide rows into parts for the devices of a fleet; otherwise as :func:`parts_of`.

    No part is over the credit of a device: the slower the devices, the smaller the parts.

    Args:
        fleet: the devices.
        tokens: the tokens of each row.
        batch_tokens: the tokens of one batch.
    """
    devices = fleet.eligible
    fastest = max((device.tokens_per_s or 0.0 for device in devices), default=0.0)
    return parts_of(
        tokens,
        devices=len(devices),
        most_tokens=min([batch_tokens, *(device.credit_tokens for device in devices)]),
        least_tokens=LEAST_PART_S * fastest,
    )


def parts_of(
    tokens: Sequence[int], *, devices: int, most_tokens: int, least_tokens: float = 0
) -> list[range]:
    """Divide rows into parts of consecutive rows, none empty.

    There are as many parts as keep the devices evenly busy. None is over ``most_tokens``, which is one
    batch: a device can serve other calls between two parts, and little is lost with a device.

    Args:
        tokens: the tokens of each row.
        devices: how many share the work.
        most_tokens: the tokens of a part at most, unless one row has more.
        least_tokens: the tokens that are worth a message, as far as ``most_tokens`` allows.

    Returns:
        The rows of each part.
    """
    total = sum(tokens)
    fair = total / (PARTS_PER_DEVICE * max(1, devices))
    goal = min(most_tokens, max(fair, least_tokens, 1))
    goal = total / math.ceil(total / goal)  # parts of one size, instead of a small last one
    parts: list[range] = []
    start = size = 0
    for row, count in enumerate(tokens):
        # The part ends before this row if that is nearer to the goal.
        if size and (size + count > most_tokens or size + count / 2 > goal):
            parts.append(range(start, row))
            start, size = row, 0
        size += count
    parts.append(range(start, len(tokens)))
    return parts
