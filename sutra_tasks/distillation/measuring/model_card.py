"""The model card of a student: the README.md in its folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sutra_tasks.distillation.measuring.report import OF_TRAINING, was_trained

if TYPE_CHECKING:
    from sutra_tasks.distillation.config import DistillationConfig

__all__ = ["card_facts", "model_card"]


def card_facts(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of a report that a model card shows.

    Args:
        report: in the shape of :class:`~sutra_tasks.distillation.measuring.report.Report`.
    """
    trained = was_trained(report)
    quality = {
        name: value["value"] if isinstance(value, Mapping) else value
        for name, value in report["quality"].items()
        if value is not None and (trained or name not in OF_TRAINING)
    }
    counts = {name: value for name, value in report["corpus"].items() if isinstance(value, int)}
    sizes = {f"{name}, teacher and student": value for name, value in report["sizes"].items()}
    speed = {"speed_improvement": report["speed"]["speed_improvement"]}
    return {"Texts": counts, "Quality on held-out text": quality, "Speed and size": speed | sizes}


def model_card(config: DistillationConfig, facts: Mapping[str, Any]) -> str:
    """Return a model card in Markdown: teacher, data, recipe and measurements.

    Args:
        config: the recipe; the card names its files and shows no text.
        facts: figures and short names, by name; each mapping becomes a table of its own.
    """
    tags = ("sentence-transformers", "feature-extraction", "sentence-similarity", "distillation")
    front = ["---", "library_name: sentence-transformers", "pipeline_tag: sentence-similarity", "tags:"]
    front += [*(f"- {tag}" for tag in tags), "---", ""]
    kinds = {
        "layers": "the teacher with fewer layers and a projection",
        "named": f"{config.student_model} and a projection",
        "static": "a vector a token, no transformer",
        "projection": "the teacher and a projection, not trained",
    }
    data = [*config.texts, *(["a sample of real traffic"] if config.sample else [])]
    recipe = {
        name: value
        for name, value in config.to_json().items()
        if name not in {"v", "teacher", "texts", "sample", "pairs"} and value is not None
    }
    lines = [
        f"# {config.name or 'A distilled embedding model'}",
        "",
        f"Distilled from `{config.teacher}` by sutra-tasks: {kinds[config.student]}.",
        "Its vectors live in a space of their own, that of the teacher's projected vectors.",
        "",
        "## Data",
        "",
        *(f"- {name}" for name in data),
        *([f"- {config.pairs} (labelled pairs)"] if config.pairs else []),
        "",
        "## Measured",
        "",
        *_table({name: value for name, value in facts.items() if not isinstance(value, Mapping)}),
    ]
    for name, value in facts.items():
        if isinstance(value, Mapping):
            lines += [f"### {_cell(name)}", "", *_table(value)]
    return "\n".join([*front, *lines, "## Recipe", "", *_table(recipe)])


def _table(rows: Mapping[str, Any]) -> list[str]:
    if not rows:
        return []
    shown = [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items()]
    return ["| | |", "| --- | --- |", *shown, ""]


def _cell(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
