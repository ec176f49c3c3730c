"""The command ``sutra``.

Modules:

- ``commands`` and ``model_commands``: the commands and their options
- ``up``: starts a fleet on this machine
- ``embedding``: embeds texts; ``reading``: takes them from a file or standard input
- ``status``, ``health``: show the fleet
- ``dead_letters``: messages that were given up
- ``stream``: producers, readers and state of streams
- ``distill``, ``models``: runs of distillation, and the registry
- ``server``: the connection to the broker
- ``screen``: names and reasons that come from elsewhere, as a terminal may show them

Imports everything else; nothing imports it.
"""

from __future__ import annotations

import io
import sys

from sutra_tasks.extras import how_to_install
from sutra_tasks.host.processes import end_on_signals

__all__ = ["main"]


def main() -> None:
    """Run the command line; errors of this package become one line and exit status 1.

    SIGTERM and a closed terminal end a command as Ctrl-C does: in order, and without a traceback.
    """
    end_on_signals()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal need not have every character
    try:
        from sutra_tasks.cli.model_commands import cli  # it adds to those of commands.py
    except ModuleNotFoundError as error:
        if (needed := how_to_install(error)) is None:
            raise
        sys.exit(f"sutra: {needed}")
    cli(prog_name="sutra")
