"""Restricts the SDPA kernels that torch may use, which is a setting of the whole process.

Models are probed while batches of others run. Forward passes that allow the same kernels run at the same
time. One that allows other kernels waits until none runs, and later ones wait behind it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["SDPA_KERNELS", "SdpaKernels"]


class SdpaKernels:
    """The setting of one process; safe to use from many threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._allowed: frozenset[SDPBackend] = frozenset()
        self._running = self._waiting = 0
        self._setting = ExitStack()

    @contextmanager
    def only(self, kernels: Iterable[SDPBackend]) -> Iterator[None]:
        """Allow only these kernels inside a block; none: the block does not use SDPA."""
        allowed = frozenset(kernels)
        if not allowed:
            yield
            return
        with self._changed:
            if self._running and (self._waiting or allowed != self._allowed):
                self._waiting += 1
                self._changed.wait_for(lambda: not self._running)
                self._waiting -= 1
            if not self._running:
                self._allowed = allowed
                self._setting.enter_context(sdpa_kernel(list(allowed)))
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                if not self._running:
                    self._setting.close()
                    self._changed.notify_all()


SDPA_KERNELS: Final = SdpaKernels()
