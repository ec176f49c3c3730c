"""``sutra distill``: sends a recipe, shows its progress, and prints its result."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from celery.exceptions import TaskRevokedError
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sutra_tasks import keys
from sutra_tasks.app import app
from sutra_tasks.cli.screen import plain
from sutra_tasks.cli.server import connected
from sutra_tasks.distillation.config import VERSION, DistillationConfig
from sutra_tasks.distillation.distill_task import distill
from sutra_tasks.errors import SettingsError, SutraError

if TYPE_CHECKING:
    from sutra_tasks.settings import Settings

__all__ = ["cancel", "recipe", "run", "sparkline", "within"]

POLL_S: Final = 0.5
UNTAKEN_S: Final = 5.0
"""Seconds without progress after which the display says what may be missing."""
BARS: Final = "▁▂▃▄▅▆▇█"
WIDTH: Final = 40


def recipe(file: Path | None, given: Mapping[str, Any]) -> DistillationConfig:
    """Return the recipe of a file and of options; options override the file.

    Raises:
        SutraError: the file is not a recipe.
    """
    chosen: Any = {}
    if file is not None:
        try:
            chosen = json.loads(file.read_bytes())
        except (OSError, ValueError) as error:
            raise SettingsError("--config", str(file), f"is not JSON: {error}") from None
        if not isinstance(chosen, dict):
            raise SettingsError("--config", str(file), "is JSON, but no object with options by name")
    # A stored recipe has its format's version; one that was typed need not have it.
    options = {name: value for name, value in given.items() if value not in (None, ())}
    return DistillationConfig.from_json({"v": VERSION, **chosen, **options})


def sparkline(values: Sequence[float], width: int = WIDTH) -> str:
    """Return numbers as a line of at most ``width`` bars, evenly spaced over all numbers."""
    if not values:
        return ""
    shown = [values[at * len(values) // width] for at in range(width)] if len(values) > width else values
    low, high = min(shown), max(shown)
    span = high - low or 1.0
    return "".join(BARS[round((value - low) / span * (len(BARS) - 1))] for value in shown)


def cancel(options: Settings, task_id: str) -> None:
    """Cancel a run: it ends between two steps, or does not begin."""
    client = connected(options)
    # Running workers get the revoke; a worker that starts later reads the mark.
    client.set(keys.cancelled(task_id), 1, ex=keys.DISTILLED_S)
    app.AsyncResult(task_id).revoke()
    print(f"{task_id} ends at its next step. The same recipe goes on from there.")  # noqa: T201


def run(
    options: Settings,
    config: DistillationConfig | None,
    *,
    attach: str | None,
    follow: bool,
    as_json: bool,
) -> None:
    """Send a recipe or attach to a run, and follow it if wanted."""
    connected(options)
    if config is not None and options.data_dir is not None:
        config = within(config, options.data_dir)
    result = app.AsyncResult(attach) if config is None else distill.delay(config)
    if not (follow or attach):
        print(result.id)  # noqa: T201 - this is the output
        return
    console = Console(stderr=True)
    try:
        found = _followed(result, console)
    except KeyboardInterrupt:
        console.print(
            plain(
                f"the run goes on. Watch it: sutra distill --attach {result.id}; "
                f"end it: sutra distill --cancel {result.id}"
            )
        )
        sys.exit(130)
    if as_json:
        print(json.dumps(found, indent=2))  # noqa: T201 - this is the output
    else:
        Console().print(_summary(found))
        if options.models_dir is not None:
            name, _, version = str(found["model"]).partition("@")
            report = Path(options.models_dir) / name / version / found["report"]
            console.print(plain(f"report: {report}"))
        promote = str(found["model"]).replace("@", " ")
        console.print(plain(f"put it to work: sutra models promote {promote}"))


def within(config: DistillationConfig, data_dir: str) -> DistillationConfig:
    """Return a recipe with the names of its files relative to ``data_dir``, as workers need them."""

    def relative(name: str) -> str:
        with suppress(ValueError, OSError):
            return str(Path(name).resolve(strict=True).relative_to(Path(data_dir).resolve()))
        return name

    pairs = None if config.pairs is None else relative(config.pairs)
    return replace(config, texts=tuple(map(relative, config.texts)), pairs=pairs)


def _followed(result: Any, console: Console) -> dict[str, Any]:
    """Show the progress of a run until it ends, and return its result."""
    began = time.monotonic()
    losses: list[float] = []
    qualities: list[float] = []
    with Live(console=console, refresh_per_second=4, transient=True) as live:
        while not result.ready():
            info = result.info if result.state == "PROGRESS" else None
            if isinstance(info, Mapping):
                _note(losses, info.get("loss"))
                _note(qualities, info.get("quality"))
                live.update(_drawn(info, losses, qualities))
            elif time.monotonic() - began > UNTAKEN_S:
                live.update(
                    Text(
                        "waiting for a distill worker. `sutra up` starts one where SUTRA_DATA_DIR and "
                        "SUTRA_MODELS_DIR are set; other runs may be before this one."
                    )
                )
            time.sleep(POLL_S)
    try:
        found: dict[str, Any] = result.get(timeout=10)
    except SutraError:
        raise
    except TaskRevokedError:
        raise SutraError("the run was cancelled; the same recipe goes on from there") from None
    except Exception as error:  # noqa: BLE001 - whatever ended the run is told in one line
        raise SutraError(f"the run failed, and the worker's log says more: {error!r}") from None
    return found


def _note(values: list[float], value: Any) -> None:
    if isinstance(value, int | float) and (not values or values[-1] != value):
        values.append(float(value))


def _drawn(info: Mapping[str, Any], losses: Sequence[float], qualities: Sequence[float]) -> Group:
    done, total = info.get("step", info.get("done")), info.get("steps", info.get("of"))
    head = plain(info.get("phase", ""), "bold")
    if info.get("epoch"):
        head.append(f"  epoch {info['epoch']} of {info['epochs']}", style="")
    if done is not None and total:
        head.append(f"  {done:,} of {total:,}", style="")
    if info.get("left_s"):
        head.append(f"  {_minutes(info['left_s'])} left", style="dim")
    lines: list[Any] = [head]
    if total:
        lines.append(ProgressBar(total=total, completed=done or 0, width=60))
    if losses:
        lines.append(Text(f"loss     {losses[-1]:8.4f}  {sparkline(losses)}"))
    if qualities:
        lines.append(Text(f"quality  {qualities[-1]:8.4f}  {sparkline(qualities)}"))
    return Group(*lines)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"  # noqa: PLR2004


def _summary(found: Mapping[str, Any]) -> Table:
    made = "" if found["made"] else " (it was there, made of the same recipe and texts)"
    title = plain(f"{found['model']}{made}")
    drawn = Table(title=title, box=None, show_header=False, title_justify="left")
    for name, value in found["metrics"].items():
        if value is not None:
            drawn.add_row(name, f"{value:,.4f}" if isinstance(value, float) else plain(value))
    if found["bad_rows"]:
        drawn.add_row("bad rows", f"{found['bad_rows']:,} (the report names them)")
    return drawn
