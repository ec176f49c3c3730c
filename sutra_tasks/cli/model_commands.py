"""The commands ``sutra distill`` and ``sutra models``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sutra_tasks.cli.commands import cli
from sutra_tasks.distillation.config import STUDENTS
from sutra_tasks.settings import settings

__all__ = ["cli", "distill", "models"]


@cli.command()
@click.option("--teacher", metavar="MODEL", help="The model to learn from.")
@click.option("--texts", multiple=True, metavar="FILE", help="In SUTRA_DATA_DIR; may be given again.")
@click.option("--pairs", metavar="FILE", help="JSONL of labelled pairs: query and positive.")
@click.option("--dim", "output_dim", type=int, metavar="N", help="Width of the student's vectors.")
@click.option("--layers", type=int, metavar="N", help="How many of the teacher's layers it keeps.")
@click.option("--student", type=click.Choice(STUDENTS), help="What kind of student; default: layers.")
@click.option("--epochs", "max_epochs", type=int, metavar="N", help="At most.")
@click.option("--held-out", type=int, metavar="N", help="Texts to measure on; default: 1,000.")
@click.option("--name", metavar="NAME", help="Of the model it becomes a version of.")
@click.option(
    "--config",
    "file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A recipe as JSON; options go before it.",
)
@click.option("--sample", is_flag=True, default=None, help="Learn from the sample of real traffic, too.")
@click.option("--follow", is_flag=True, help="Show its progress until it has ended.")
@click.option("--attach", metavar="TASK", help="Follow a run that is under way.")
@click.option("--cancel", metavar="TASK", help="End a run at its next step.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def distill(
    *,
    file: Path | None,
    follow: bool,
    attach: str | None,
    cancel: str | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Make a smaller, faster model of a larger one."""
    from sutra_tasks.cli import distill as command

    if cancel is not None:
        command.cancel(settings(), cancel)
        return
    config = None if attach else command.recipe(file, given)
    command.run(settings(), config, attach=attach, follow=follow, as_json=as_json)


@cli.group()
def models() -> None:
    """The models of the registry, SUTRA_MODELS_DIR, and which version of each serves."""


@models.command("list")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print the facts as JSON.")
def models_list(*, name: str | None, as_json: bool) -> None:
    """Show models and their versions."""
    from sutra_tasks.cli.models import run_list

    run_list(settings(), name, as_json=as_json)


@models.command("add")
@click.argument("name")
@click.argument("model", metavar="MODEL|FOLDER")
def models_add(*, name: str, model: str) -> None:
    """Make a model, as it is, a new version: such as the teacher, to go back to."""
    from sutra_tasks.cli.models import run_add

    run_add(settings(), name, model)


@models.command("promote")
@click.argument("name")
@click.argument("version", type=int)
@click.option("--cosine", type=float, help="Least mean cosine to the projected teacher.")
@click.option("--spearman", type=float, help="Least rank correlation of similarities.")
@click.option("--ndcg", type=float, help="Least share of the teacher's NDCG@10.")
def models_promote(
    *, name: str, version: int, cosine: float | None, spearman: float | None, ndcg: float | None
) -> None:
    """Have a version serve, if it passes the gate on every device."""
    from sutra_tasks.cli.models import run_promote

    run_promote(settings(), name, version, cosine=cosine, spearman=spearman, ndcg=ndcg)


@models.command("rollback")
@click.argument("name")
def models_rollback(*, name: str) -> None:
    """Have the version serve that served before."""
    from sutra_tasks.cli.models import run_rollback

    run_rollback(settings(), name)
