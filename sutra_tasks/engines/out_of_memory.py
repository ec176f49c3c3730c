"""Recognises that an engine ran out of memory."""

from __future__ import annotations

from typing import Final

__all__ = ["is_out_of_memory"]

OUT_OF_MEMORY: Final = ("out of memory", "can't allocate memory")
"""Parts of torch's messages on GPUs and on CPUs."""


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an engine ran out of memory, so that a smaller batch may fit."""
    # torch's error is recognised by its name, because importing torch takes seconds.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    words = str(error).lower() if isinstance(error, RuntimeError) else ""
    return any(said in words for said in OUT_OF_MEMORY)
