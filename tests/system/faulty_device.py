"""A device that does what its texts tell it: ``python faulty_device.py device``.

The device that computes a text ``!<order> ...`` obeys it; ``!<order>@<device> ...`` is for one device,
and ``!once-<order> ...`` for the first process that computes it. A file in the folder ``FAULTS`` lists
the texts that were computed.

* ``raise`` raises; ``die`` ends the process; ``nan`` makes every vector from now on not a number
* ``answer`` ends the process once it has stored a result, before it can acknowledge the message
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
from celery.signals import task_success

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
    if order == "answer":
        _State.ends_after_storing = True
    if order == "nan":
        _State.broken = True


class _State:
    broken = False
    ends_after_storing = False


def end_if_ordered(**_: Any) -> None:
    """End this process between storing a result and acknowledging its message, if a text says so."""
    if _State.ends_after_storing:
        os.kill(os.getpid(), signal.SIGKILL)


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
    task_success.connect(end_if_ordered)


if __name__ == "__main__":
    install(Path(os.environ["FAULTS"]))
    main(sys.argv[1:])
