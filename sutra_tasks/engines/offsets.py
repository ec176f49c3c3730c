"""Where the tokens of a text stand in it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Integers", "Offsets"]

Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Offsets:
    """Where the tokens of a text stand in it, in characters: one int64 start and end for each token.

    Special tokens and prompt are not among them. Tokens may share characters, as bytes of an emoji do.
    """

    starts: Integers
    ends: Integers

    def __len__(self) -> int:
        return len(self.starts)
