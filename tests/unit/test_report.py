"""The page: whole, by itself, escaped, and the same for the same facts."""

import json
import re
import sys
from functools import cache
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from sutra_tasks.distillation.config import DistillationConfig, DistillationMetrics
from sutra_tasks.distillation.measuring.quality import Quality, measure_quality
from sutra_tasks.distillation.measuring.ranking import unit
from sutra_tasks.distillation.measuring.report import MEANINGS, Report, render

VOID = {"meta", "br"}
HOSTILE = "<script>alert(1)</script>\"'&"


class Page(HTMLParser):
    """Checks that every element is closed in turn, and keeps ids, attributes, headings and texts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.said: list[str] = []
        self.headings: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.said.append(data)
            if self.open[-1] == "h2":
                self.headings.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.said).split())


@cache
def measured() -> Quality:
    """Measure once: the tests of the page need any figures."""
    rng = np.random.default_rng(0)
    teacher = unit(rng.standard_normal((200, 16)).astype(np.float32))
    student = unit(teacher + np.float32(0.1) * rng.standard_normal((200, 16)).astype(np.float32))
    return measure_quality(teacher, student, np.eye(16, dtype=np.float32), rng=rng, repeats=50)


def facts() -> Report:
    rng = np.random.default_rng(1)
    return {
        "name": "minilm-layers3-192",
        "created_at": "2026-11-23T09:00:00+00:00",
        "teacher": {"name": "all-MiniLM-L6-v2", "space": "space-of-teacher"},
        "student": {"space": "space-of-student", "width": 192},
        "recipe": DistillationConfig(teacher="m", texts=("a.jsonl", "b.csv"), output_dim=192).to_json(),
        "corpus": {
            "files": ["a.jsonl", "b.csv"],
            "texts": 14_000,
            "held_out": 1_000,
            "sampled": 0,
            "pairs": 0,
            "bad_rows": 31,
            "bad": ["a.jsonl:17: not JSON", "b.csv:3: no text"],
            "duplicates": 12,
        },
        "training": {
            "epochs": 3,
            "steps": 1_314,
            "seconds": 372.5,
            "curves": [
                {
                    "step": step,
                    "quality": 0.95 - 0.3 / (1 + step / 100),
                    "loss": 1 / (1 + step / 100),
                    "mse": 1.2 / (1 + step / 100),
                    "cosine": 0.6 / (1 + step / 100),
                    "similarity": 0.0,
                    "task": 0.0,
                }
                for step in range(100, 1_400, 100)
            ],
        },
        "metrics": DistillationMetrics(
            lifted_cosine=0.88,
            cosine_similarity=0.93,
            compression_ratio=2.6,
            speed_improvement=1.83,
            texts=1_000,
        ).to_json(),
        "quality": measured().to_json(),
        "cosines": np.clip(rng.normal(0.92, 0.03, 1_000), 0, 1).tolist(),
        "speed": {"speed_improvement": 1.83, "texts": 128, "repeats": 5},
        "sizes": {
            "parameters": [22_713_216, 17_389_824],
            "bytes_on_disk": [90_864_192, 34_800_000],
            "bytes_per_vector": [1_536, 768],
        },
        "versions": {"torch": "2.9.0"},
    }


@pytest.fixture(scope="module")
def whole() -> Report:
    return facts()


@pytest.fixture(scope="module")
def html(whole: Report) -> str:
    return render(whole)


def test_the_page_is_well_formed_and_no_two_parts_share_an_id(html: str) -> None:
    page = Page(html)
    assert page.tags.count("svg") == 3
    assert len(page.ids) == len(set(page.ids))
    used = set(re.findall(r"url\(#([^)]+)\)", html)) | {
        str(value).removeprefix("#") for name, value in page.attributes if name.endswith("href")
    }
    assert used
    assert used <= set(page.ids)


def test_the_page_asks_nobody_for_anything(html: str) -> None:
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object", "base", "form", "a"} & set(page.tags)
    assert "@import" not in html
    for name, value in page.attributes:
        if name.startswith("xmlns"):
            continue  # a name, not an address
        assert "//" not in str(value), name
        assert not name.startswith("on")
        assert name != "src"
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


def test_the_page_says_what_was_measured(whole: Report, html: str) -> None:
    page = Page(html)
    assert page.headings == ["Quality", "Speed and size", "Training", "Data", "Recipe", "Versions"]
    for name, (label, meaning) in MEANINGS.items():
        there = whole["quality"][name] is not None
        assert (label in page.text) == (meaning in page.text) == there or name.startswith("ndcg_")
    assert "NDCG@10 kept on labels" not in page.text
    spearman = whole["quality"]["spearman"]
    assert f"{spearman['value']:.4f} {spearman['low']:.4f} to {spearman['high']:.4f}" in page.text
    for part in (
        "space-of-teacher",
        "14,000",
        "a.jsonl:17: not JSON",
        "the first 2 of 31",
        "22,713,216 17,389,824 1.31x",
        "2.60x smaller on disk",
        "1.83x the teacher's speed",
        "threshold 0.98",
        "1,314 steps, epochs: 3, 6.2 minutes",
        "learning_rate 0.0005",
        "a.jsonl, b.csv",
    ):
        assert part in page.text, part


def test_terms_that_took_no_part_are_not_drawn(html: str) -> None:
    assert re.findall(r">(loss|mse|cosine|similarity|task)</text>", html) == ["loss", "mse", "cosine"]


def test_plots_take_the_pages_ink(html: str) -> None:
    assert "#010203" not in html
    assert html.count("currentColor") > 50
    assert "#000000" not in html
    assert "#ffffff" not in html


def test_labels_give_their_own_rows_and_never_those_of_the_teachers_ranking(whole: Report) -> None:
    interval = {"value": 0.972, "low": 0.96, "high": 0.98}
    page = Page(render({**whole, "quality": {**whole["quality"], "ndcg_ratio": interval}}))
    assert "0.972 of the teacher's NDCG@10 on labels" in page.text
    assert "NDCG@10 kept on labels" in page.text
    assert "NDCG@10 against the teacher's ranking" in page.text


def test_the_same_facts_give_the_same_page(whole: Report, html: str) -> None:
    assert render(json.loads(json.dumps(whole))) == html


@pytest.mark.parametrize("missing", Report.__annotations__)
def test_what_is_missing_is_left_out(whole: Report, missing: str) -> None:
    Page(render({name: value for name, value in whole.items() if name != missing}))


def test_nothing_is_a_page_too() -> None:
    page = Page(render({}))
    assert page.headings == []
    assert "svg" not in page.tags


def test_a_student_that_was_not_trained_has_no_curves(whole: Report) -> None:
    untrained = {"epochs": 0, "steps": 0, "curves": [], "seconds": 0.0}
    page = Page(render({**whole, "training": untrained}))
    assert page.tags.count("svg") == 1
    assert "Nothing was trained" in page.text
    # Its cosine to the projected teacher is 1 by construction: what is kept of the teacher is told
    # instead.
    assert "1 by construction" in page.text
    assert "Cosine to the target" not in page.text


def test_what_is_kept_of_the_teacher_is_told_first(whole: Report) -> None:
    page = Page(render(whole))
    assert list(MEANINGS)[:2] == ["lifted_cosine", "ceiling"]
    first = page.text.index("lifted cosine to the teacher")
    assert first < page.text.index("Spearman")
    assert next(iter(DistillationMetrics().to_json())) == "lifted_cosine"


def test_every_string_is_escaped(whole: Report) -> None:
    def hostile(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: hostile(inner) for name, inner in value.items()}
        if isinstance(value, list | tuple):
            return [hostile(inner) for inner in value]
        return HOSTILE if isinstance(value, str) else value

    html = render({**hostile(whole), "versions": {HOSTILE: HOSTILE}})
    assert "<script" not in html
    assert Page(html).text.count(HOSTILE) > 8


def test_without_matplotlib_the_page_says_what_is_missing(
    whole: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = Page(render(whole))
    assert "svg" not in page.tags
    assert "pip install 'sutra-tasks[distill]'" in page.text
    assert "14,000" in page.text
