"""``sutra dead-letters``: lists messages that were given up, sends them again, or drops them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from sutra_tasks.broker.dead_letters import DeadLetter, dead_letters, drop, retry
from sutra_tasks.cli.screen import plain
from sutra_tasks.cli.server import connected
from sutra_tasks.errors import SutraError

if TYPE_CHECKING:
    import redis

    from sutra_tasks.settings import Settings

__all__ = ["run_drop", "run_list", "run_retry"]


def run_list(options: Settings, *, as_json: bool) -> None:
    """Print the dead letters, without their texts."""
    letters = dead_letters(connected(options))
    if as_json:
        shown = [
            {"task_id": one.task_id, "reason": one.reason, "attempts": one.attempts, "at": one.at}
            for one in letters
        ]
        print(json.dumps(shown, indent=2))  # noqa: T201 - this is the output
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("task", "given up at", "attempts", "reason"):
        table.add_column(name)
    for one in letters:
        at = datetime.fromtimestamp(one.at, UTC).isoformat(sep=" ", timespec="seconds")
        table.add_row(plain(one.task_id), at, str(one.attempts), plain(one.reason))
    console = Console()
    console.print(table if letters else "no dead letters")


def run_retry(options: Settings, task_ids: Sequence[str]) -> None:
    """Send dead letters again."""
    _apply(options, task_ids, retry, "sent again")


def run_drop(options: Settings, task_ids: Sequence[str]) -> None:
    """Delete dead letters."""
    _apply(options, task_ids, drop, "dropped")


def _apply(
    options: Settings,
    task_ids: Sequence[str],
    action: Callable[[redis.Redis, Sequence[DeadLetter]], int],
    done: str,
) -> None:
    client = connected(options)
    letters = dead_letters(client)
    if task_ids:
        unknown = sorted(set(task_ids) - {one.task_id for one in letters})
        if unknown:
            raise SutraError(f"no dead letter of task {', '.join(unknown)}")
        letters = [one for one in letters if one.task_id in task_ids]
    Console().print(f"{action(client, letters)} {done}")
