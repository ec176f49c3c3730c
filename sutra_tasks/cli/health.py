"""``sutra health``: every device runs a self-check now and reports its health."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any, Final

import redis
from kombu.exceptions import OperationalError
from rich.console import Console
from rich.table import Table

from sutra_tasks.app import app
from sutra_tasks.cli.screen import plain
from sutra_tasks.cli.server import connected
from sutra_tasks.errors import SutraError

if TYPE_CHECKING:
    from sutra_tasks.settings import Settings

__all__ = ["run"]

ANSWER_S: Final = 6.0
"""Seconds that devices have for their self-checks and answers."""

CHECKED: Final = {True: "[green]passed[/]", False: "[red]failed[/]", None: "[yellow]no answer[/]"}


def run(options: Settings, *, as_json: bool) -> None:
    """Ask every device and print the answers; exit status 1 unless all that answer are healthy."""
    connected(options).close()
    try:
        answers = app.control.broadcast("sutra_health", reply=True, timeout=ANSWER_S) or []
    except (OperationalError, redis.RedisError, OSError) as error:
        raise SutraError(f"the server of SUTRA_BROKER_URL does not answer: {error}") from None
    found: dict[str, dict[str, Any]] = {
        name: report
        for answer in answers
        for name, report in sorted(answer.items())
        if report is not None and "state" in report
    }
    if as_json:
        print(json.dumps(found, indent=2))  # noqa: T201 - this is the output
    else:
        _show(found)
    if not found:
        sys.exit("sutra: no device answered. `sutra status` shows what is known of the fleet.")
    if not all(report["is_healthy"] and report["check_passed"] for report in found.values()):
        sys.exit(1)


def _show(found: dict[str, dict[str, Any]]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("device", "state", "self-check", "memory", "warnings"):
        table.add_column(name)
    for name, report in found.items():
        share = report["memory_share"]
        warnings = "; ".join(report["warnings"]) or report["reason"]
        table.add_row(
            plain(name), plain(report["state"]), CHECKED[report["check_passed"]],
            "unknown" if share is None else f"{share:.0%} ({report['memory']['source']})",
            plain(warnings),
        )  # fmt: skip
    Console().print(table)
