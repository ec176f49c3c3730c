"""The command ``sutra``."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line; errors of this package become one line and exit status 1."""
    try:
        from sutra_tasks.cli.model_commands import cli  # with those of commands.py
    except ModuleNotFoundError as error:
        if error.name != "rich":
            raise
        sys.exit("sutra: the command line needs rich: pip install 'sutra-tasks[cli]'")
    cli(prog_name="sutra")
