"""A device that does what its texts tell it: ``python faulty_device.py device``.

A text ``!<order> ...`` is obeyed by whoever computes it, ``!<order>@<device> ...`` by that device only,
and ``!once-<order> ...`` by one process only. The folder ``FAULTS`` notes what was computed.

* ``raise`` raises; ``die`` ends the process; ``nan`` makes every vector from now on not a number
* ``hang`` never returns, and holds the GIL meanwhile, as a hung driver does
"""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sutra_tasks.engines.encoder import TokenizedText
from sutra_tasks.engines.simulated_engine import SimulatedEncoder
from sutra_tasks.roles.__main__ import main

COMPUTED = "computed"


def obey(text: str, folder: Path) -> None:
    """Do what a text says."""
    word = text.partition(" ")[0].removeprefix("!")
    order, _, device = word.partition("@")
    if device not in ("", os.environ["SUTRA_DEVICE_ID"]):
        return
    if order.startswith("once-"):
        order = order.removeprefix("once-")
        try:
            (folder / text.replace("/", "_")[:100]).touch(exist_ok=False)
        except FileExistsError:
            return
    if order == "raise":
        raise ValueError(text)
    if order == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if order == "hang":
        ctypes.PyDLL(None).sleep(3600)
    if order == "nan":
        _State.broken = True


class _State:
    broken = False


def install(folder: Path) -> None:
    """Make this process's engine obey."""
    encode = SimulatedEncoder.encode
    log = os.open(folder / COMPUTED, os.O_CREAT | os.O_APPEND | os.O_WRONLY)

    def obeying(self: SimulatedEncoder, batch: Sequence[TokenizedText]) -> Any:
        texts: list[str] = [text.content for text in batch]
        os.write(log, "".join(f"{text}\n" for text in texts).encode())
        rows = encode(self, batch)
        for text in texts:
            if text.startswith("!"):
                obey(text, folder)
        return np.full_like(rows, np.nan) if _State.broken else rows

    SimulatedEncoder.encode = obeying  # type: ignore[method-assign]


if __name__ == "__main__":
    install(Path(os.environ["FAULTS"]))
    main(sys.argv[1:])
