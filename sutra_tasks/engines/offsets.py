"""The positions of a text's tokens in the text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Integers", "Offsets"]

Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Offsets:
    """For each token of a text its first character and the character after its last one, int64.

    Special tokens and prompt are left out. Tokens may share characters, as the bytes of an emoji do.
    """

    starts: Integers
    ends: Integers

    def __len__(self) -> int:
        return len(self.starts)
