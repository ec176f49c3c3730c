"""The report of a distillation: one HTML file that loads nothing from the network.

It has no script, and its styles and plots are in the page. It follows the reader's light or dark mode,
and fits a phone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any, Final, TypedDict

from sutra_tasks.distillation.measuring.plots import cosine_histogram, curves

__all__ = ["OF_TRAINING", "Report", "render", "was_trained"]


class Report(TypedDict, total=False):
    """The content of ``report.json``; the page leaves out what is missing.

    Attributes:
        name: of the model in the registry.
        created_at: ISO 8601, with its zone.
        teacher: ``name`` and ``space``.
        student: ``space`` and ``width``.
        recipe: :meth:`DistillationConfig.to_json`.
        corpus: ``files``, counts (``texts``, ``held_out``, ``sampled``, ``pairs``, ``bad_rows``,
            ``duplicates`` and others), and in ``bad`` the first bad rows as ``file:line: reason``.
        training: ``epochs``, ``steps``, ``seconds``, and ``curves``: for each evaluation ``step``,
            ``quality``, and the means of the loss and its terms since the one before.
        metrics: :meth:`DistillationMetrics.to_json`.
        quality: :meth:`Quality.to_json`.
        cosines: lifted cosine of each held-out text.
        speed: ``speed_improvement``, and the numbers of ``texts`` and ``repeats`` of the measurement.
        sizes: ``parameters``, ``bytes_on_disk`` and ``bytes_per_vector``, each of teacher and student.
        versions: of packages, by name.
    """

    name: str
    created_at: str
    teacher: Mapping[str, Any]
    student: Mapping[str, Any]
    recipe: Mapping[str, Any]
    corpus: Mapping[str, Any]
    training: Mapping[str, Any]
    metrics: Mapping[str, Any]
    quality: Mapping[str, Any]
    cosines: Sequence[float]
    speed: Mapping[str, Any]
    sizes: Mapping[str, Sequence[int]]
    versions: Mapping[str, str]


MEANINGS: Final = {
    "lifted_cosine": (
        "Lifted cosine: what is kept of the teacher",
        "Mean between the teacher's own vector and the student's, brought back to the teacher's width.",
    ),
    "ceiling": ("Ceiling", "The highest lifted cosine that any student of this projection can have."),
    "spearman": (
        "Spearman",
        "Rank correlation of the similarities of pairs of texts: 1 if all pairs keep their order.",
    ),
    "top10": ("Top-10 overlap", "Share of a text's ten nearest held-out texts on which both agree."),
    "ranking_ndcg": (
        "NDCG@10 against the teacher's ranking",
        "How alike both rank the other texts; it says nothing of which one ranks them better.",
    ),
    "ndcg_ratio": (
        "NDCG@10 kept on labels",
        "The student's NDCG@10 over the teacher's on labelled retrieval: over 1 it finds more.",
    ),
    "ndcg_teacher": ("NDCG@10 of the teacher", "On labelled retrieval."),
    "ndcg_student": ("NDCG@10 of the student", "On labelled retrieval."),
    "cosine": (
        "Cosine to the target",
        "Mean between the student's vector and the teacher's, projected to its width.",
    ),
    "cosine_p5": (
        "Cosine to the target, 5th percentile",
        "Nineteen of twenty texts are at least so close.",
    ),
    "mse": (
        "Squared error to the target",
        "Mean over texts of the squared distance of unit vectors, summed over dimensions: 0 to 4.",
    ),
}
"""The figures of quality in the order in which they are shown, each with its label and its meaning."""

OF_TRAINING: Final = ("cosine", "cosine_p5", "mse")
"""Figures that say how well a student learned its target. A student that is a projection alone is its
target, so they are perfect by construction."""

SIZES: Final = {
    "parameters": "Parameters",
    "bytes_on_disk": "Bytes of weights on disk",
    "bytes_per_vector": "Bytes a vector",
}

CORPUS: Final = {
    "texts": "Texts learned from",
    "held_out": "Texts held out",
    "sampled": "Of them from real traffic",
    "pairs": "Labelled pairs",
    "pairs_measured_on": "Of them measured on",
    "pairs_learned_from": "Of them learned from",
    "texts_of_pairs_left_out": "Texts left out because labelled pairs hold them",
    "duplicates": "Duplicates left out",
    "bad_rows": "Bad rows",
}

POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'"
"""Forbids scripts and requests, in case a value is ever not escaped."""

STYLE: Final = """
:root { color-scheme: light dark; --ink: #1f2328; --faint: #59636e; --line: #d1d9e0; --paper: #fff;
  --raised: #f6f8fa }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --faint: #9198a1; --line: #3d444d; --paper: #0d1117; --raised: #151b23 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { line-height: 1.2 } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line) }
.faint, small { color: var(--faint) }
.figures { display: grid; margin: 1.5rem 0; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr));
  gap: .75rem }
.figures div { background: var(--raised); border: 1px solid var(--line); border-radius: .5rem;
  padding: .75rem }
.figures b { display: block; font-size: 1.6rem; font-variant-numeric: tabular-nums }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; vertical-align: top; padding: .35rem .5rem;
  border-top: 1px solid var(--line) }
.n { text-align: right; white-space: nowrap; overflow-wrap: normal; font-variant-numeric: tabular-nums }
small { font-weight: normal }
figure { margin: 1rem 0 } svg { display: block; width: 100%; max-width: 40rem; height: auto }
@media (max-width: 32rem) { th, td { padding: .3rem .2rem; font-size: .9rem }
  td.n { white-space: normal } }
"""


def render(facts: Mapping[str, Any]) -> str:
    """Return the report as HTML.

    Args:
        facts: in the shape of :class:`Report`, which has no text of the corpus. Names and reasons are
            escaped.
    """
    title = f"Distillation of {_text(facts.get('teacher', {}).get('name', 'a model'))}"
    sections: Sequence[tuple[str, Callable[[], Iterable[str]]]] = (
        ("Quality", lambda: _quality(facts, cosine_histogram(facts))),
        ("Speed and size", lambda: _sizes(facts)),
        ("Training", lambda: _training(facts.get("training", {}), curves(facts))),
        ("Data", lambda: _corpus(facts.get("corpus", {}))),
        ("Recipe", lambda: _table((k, v) for k, v in facts.get("recipe", {}).items() if k != "v")),
        ("Versions", lambda: _table(facts.get("versions", {}).items())),
    )
    parts = [f"<h1>{title}</h1>", *_introduction(facts), *_figures(facts)]
    for heading, content in sections:
        inside = [part for part in content() if part]
        parts += [f"<section><h2>{heading}</h2>", *inside, "</section>"] if inside else []
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>",
            *parts,
            "</body>\n</html>\n",
        ]
    )


def _introduction(facts: Mapping[str, Any]) -> Iterable[str]:
    student, teacher = facts.get("student", {}), facts.get("teacher", {})
    if "name" in facts:
        when = f", {_text(facts['created_at'])}" if "created_at" in facts else ""
        yield f'<p class="faint">Model <b>{_text(facts["name"])}</b>{when}</p>'
    spaces = [("Teacher", teacher), ("Student", student)]
    yield from _table((f"{who}'s space", one["space"]) for who, one in spaces if "space" in one)


def _figures(facts: Mapping[str, Any]) -> Iterable[str]:
    quality, metrics = facts.get("quality", {}), facts.get("metrics", {})
    found = [
        (f"{_of(quality, name):.3f}", label)
        for name, label in (
            ("lifted_cosine", "lifted cosine to the teacher"),
            ("spearman", "Spearman of similarities"),
            ("ndcg_ratio", "of the teacher's NDCG@10 on labels"),
        )
        if quality.get(name) is not None
    ]
    if metrics:
        found += [
            (f"{metrics['speed_improvement']:.2f}x", "the teacher's speed"),
            (f"{metrics['compression_ratio']:.2f}x", "smaller on disk"),
        ]
    if "width" in facts.get("student", {}):
        found.append((f"{facts['student']['width']:,}", "numbers a vector"))
    if found:
        tiles = "".join(f"<div><b>{value}</b>{label}</div>" for value, label in found)
        yield f'<div class="figures">{tiles}</div>'


def was_trained(facts: Mapping[str, Any]) -> bool:
    """Return whether a report's student was trained, and is not the teacher and a projection alone."""
    return bool(facts.get("training", {"steps": 1}).get("steps"))


def _quality(facts: Mapping[str, Any], plot: str) -> Iterable[str]:
    quality, trained = facts.get("quality", {}), was_trained(facts)
    rows = [
        f"<tr><th>{label}<br><small>{meaning}</small></th>"
        f'<td class="n">{_of(quality, name):.4f}</td><td class="n">{_bounds(quality[name])}</td></tr>'
        for name, (label, meaning) in MEANINGS.items()
        if quality.get(name) is not None and (trained or name not in OF_TRAINING)
    ]
    if rows:
        yield f"<p>On {_text(quality.get('texts', '?'))} texts that were not learned from.</p>"
        head = '<tr><th></th><th class="n">Value</th><th class="n">95% interval</th></tr>'
        yield f"<table>{head}{''.join(rows)}</table>"
        if not trained:
            yield (
                "<p>The student is the projected teacher, so its cosine to that is 1 by construction "
                "and is not shown. The lifted cosine says how much of the teacher the projection "
                "keeps.</p>"
            )
    yield plot


def _sizes(facts: Mapping[str, Any]) -> Iterable[str]:
    speed, sizes = facts.get("speed", {}), facts.get("sizes", {})
    rows = [
        f'<tr><th>{label}</th><td class="n">{before:,}</td><td class="n">{after:,}</td>'
        f'<td class="n">{before / max(after, 1):.2f}x</td></tr>'
        for name, label in SIZES.items()
        if name in sizes
        for before, after in [sizes[name]]
    ]
    if rows:
        heads = "".join(f'<th class="n">{one}</th>' for one in ("Teacher", "Student", "Smaller"))
        yield f"<table><tr><th></th>{heads}</tr>{''.join(rows)}</table>"
    if speed:
        yield (
            f"<p>The student embeds {speed['speed_improvement']:.2f} times as many texts a second as "
            f"the teacher, both measured in turn, {_text(speed.get('repeats', '?'))} times, on the same "
            f"{_text(speed.get('texts', '?'))} held-out texts and the same device.</p>"
        )


def _training(training: Mapping[str, Any], plots: str) -> Iterable[str]:
    if not training:
        return
    if not training.get("steps"):
        yield "<p>Nothing was trained: the student is the teacher, projected.</p>"
        return
    seconds = training.get("seconds", 0.0)
    yield (
        f"<p>{training['steps']:,} steps, epochs: {_text(training.get('epochs', '?'))}, "
        f"{seconds / 60:,.1f} minutes.</p>"
    )
    yield plots


def _corpus(corpus: Mapping[str, Any]) -> Iterable[str]:
    counts = [(label, corpus[name]) for name, label in CORPUS.items() if name in corpus]
    files = [("Files", corpus["files"])] if corpus.get("files") else []
    yield from _table([*files, *counts])
    if corpus.get("bad"):
        named, count = corpus["bad"], corpus.get("bad_rows", len(corpus["bad"]))
        first = f", the first {len(named)} of {count:,}" if count > len(named) else ""
        items = "".join(f"<li>{_text(row)}</li>" for row in named)
        yield f"<p>Rows that could not be used{first}:</p><ul>{items}</ul>"


def _table(rows: Iterable[tuple[str, Any]]) -> Iterable[str]:
    lines = [f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in rows]
    if lines:
        yield f"<table>{''.join(lines)}</table>"


def _of(quality: Mapping[str, Any], name: str) -> float:
    found = quality[name]
    return float(found["value"] if isinstance(found, Mapping) else found)


def _bounds(found: Any) -> str:
    return f"{found['low']:.4f} to {found['high']:.4f}" if isinstance(found, Mapping) else ""


def _text(value: Any) -> str:
    if value is None or value in ([], ()):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return escape(", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value))
