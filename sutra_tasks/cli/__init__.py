"""The command ``sutra``.

Modules:

- ``commands`` and ``model_commands``: the commands and their options
- ``up``: starts a fleet on this machine
- ``embedding``: embeds texts from a file or standard input
- ``status``, ``health``: show the fleet
- ``dead_letters``: messages that were given up
- ``stream``: producers, readers and state of streams
- ``distill``, ``models``: runs of distillation, and the registry
- ``server``: the connection to the broker

Imports everything else; nothing imports it.
"""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line; errors of this package become one line and exit status 1."""
    try:
        from sutra_tasks.cli.model_commands import cli  # it adds to those of commands.py
    except ModuleNotFoundError as error:
        if error.name != "rich":
            raise
        sys.exit("sutra: the command line needs rich: pip install 'sutra-tasks[cli]'")
    cli(prog_name="sutra")
