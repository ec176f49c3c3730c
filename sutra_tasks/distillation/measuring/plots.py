"""Plots of a distillation as SVG for an HTML page, in the page's text colour."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any, Final

__all__ = ["cosine_histogram", "curves"]

INK: Final = "#010203"
"""A placeholder for the colour of the page's text, which follows light and dark mode."""

COLOURS: Final = ("#2f81f7", "#db6d28", "#3fa34d", "#a371f7", "#bf4b8a")
"""Colours that are readable on white and on black."""

BINS: Final = 40

STYLE: Final[Any] = {
    "svg.fonttype": "none",
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.2,
    "font.size": 10,
    "font.family": "sans-serif",
}


def curves(facts: Mapping[str, Any]) -> str:
    """Return plots of the losses and of the quality over steps; "" if nothing was trained."""
    points: Sequence[Mapping[str, float]] = facts.get("training", {}).get("curves", [])
    if not points:
        return ""
    steps = [point["step"] for point in points]
    terms = [
        name for name in points[0] if name not in {"step", "quality"} and any(p[name] for p in points)
    ]

    def losses(axes: Any) -> None:
        for name, colour in zip(terms, COLOURS, strict=False):
            axes.plot(steps, [point[name] for point in points], "o-", ms=3, color=colour, label=name)
        axes.set(xlabel="step", ylabel="mean since the evaluation before", ylim=(0, None))
        axes.legend(frameon=False)

    def quality(axes: Any) -> None:
        axes.plot(
            steps,
            [p["quality"] for p in points],
            "o-",
            ms=3,
            color=COLOURS[0],
            label="on held-out texts",
        )
        threshold = facts.get("recipe", {}).get("quality_threshold")
        if threshold is not None:
            axes.axhline(threshold, ls="--", color=COLOURS[1], label=f"threshold {threshold:g}")
        axes.set(xlabel="step", ylabel="mean cosine to the projected teacher")
        axes.legend(frameon=False)

    plots = [_figure("losses", "Loss and its terms", losses)] if terms else []
    return "".join([*plots, _figure("quality", "Quality while it learned", quality)])


def cosine_histogram(facts: Mapping[str, Any]) -> str:
    """Return a histogram of the held-out texts' lifted cosines; "" if there are none."""
    values = facts.get("cosines", [])
    if not len(values):
        return ""
    found = facts.get("quality", {})

    def histogram(axes: Any) -> None:
        axes.hist(values, bins=BINS, color=COLOURS[0], alpha=0.7)
        mean, ceiling = found.get("lifted_cosine"), found.get("ceiling")
        lines = (
            ("mean", mean["value"] if mean else None, COLOURS[1], "--"),
            ("ceiling", ceiling, COLOURS[2], ":"),
        )
        for label, at, colour, style in lines:
            if at is not None:
                axes.axvline(at, color=colour, ls=style, label=f"{label} {at:.3f}")
        axes.set(xlabel="lifted cosine to the teacher", ylabel="texts")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, loc="upper left")

    return _figure("cosines", "Cosine of each held-out text", histogram)


def _figure(name: str, title: str, draw: Callable[[Any], None]) -> str:
    try:
        # Takes half a second to import; and if it is missing, the report has no plots but exists.
        import matplotlib as mpl  # noqa: PLC0415
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ModuleNotFoundError:
        needed = "pip install 'sutra-tasks[distill]'"
        return f"<p>{escape(title)}: plots need matplotlib, {escape(needed)}.</p>"
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(6.4, 3.4), layout="constrained")
        draw(figure.subplots())
        drawn = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(drawn, format="svg", transparent=True, metadata=nothing)
    svg = drawn.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    # Ids are made unique, because all plots are in one page.
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
    return f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>"
