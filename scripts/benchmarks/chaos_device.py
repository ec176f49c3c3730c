"""A device worker whose engine fails on demand; ``bench chaos`` starts its devices with it.

A text that begins with ``raise`` raises an error; one that begins with ``die`` kills the process. While
a file ``<device>.nan`` is in ``CHAOS_FOLDER``, all vectors are NaN; ``<device>.hang`` hangs one call.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sutra_tasks.engines.simulated_engine import SimulatedEncoder
from sutra_tasks.roles.__main__ import main

_encode = SimulatedEncoder.encode
_FOLDER = Path(os.environ.get("CHAOS_FOLDER", "."))
_DEVICE = os.environ.get("SUTRA_DEVICE_ID", "")


def _failing(self: SimulatedEncoder, batch: Sequence[Any]) -> Any:
    if any(text.content.startswith("die") for text in batch):
        os.kill(os.getpid(), signal.SIGKILL)
    if any(text.content.startswith("raise") for text in batch):
        raise ValueError("a text asked for it")
    hang = _FOLDER / f"{_DEVICE}.hang"
    if hang.exists():
        hang.unlink()
        threading.Event().wait()
    vectors = _encode(self, batch)
    return np.full_like(vectors, np.nan) if (_FOLDER / f"{_DEVICE}.nan").exists() else vectors


if __name__ == "__main__":
    SimulatedEncoder.encode = _failing  # type: ignore[method-assign]
    main(["device", "--loglevel", "warning", "--without-heartbeat"])
