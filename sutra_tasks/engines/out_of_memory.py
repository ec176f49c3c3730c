"""Tells an engine's want of memory from its other failures."""

from __future__ import annotations

from typing import Final

__all__ = ["is_out_of_memory"]

OUT_OF_MEMORY: Final = ("out of memory", "can't allocate memory")
"""What torch says on GPUs, and on CPUs."""


def is_out_of_memory(error: Exception) -> bool:
    """Say whether an engine failed for want of memory: fewer texts at a time may fit."""
    # torch's by its name: importing it takes seconds, and other engines do without it.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    words = str(error).lower() if isinstance(error, RuntimeError) else ""
    return any(said in words for said in OUT_OF_MEMORY)
