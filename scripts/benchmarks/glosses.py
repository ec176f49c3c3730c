"""Short texts to distil on, and labels to measure with: WordNet, or docstrings of installed packages.

WordNet 3.0 is Debian's package ``wordnet-base``: read where it is installed, else fetched once with
``apt-get download`` and unpacked into a folder for temporary files. A word with one sense is a question,
and its gloss the only right answer. A hash of the gloss decides whether it serves for retrieval or for
learning, so no text serves for both.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import shutil
import subprocess
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from pydoc_data.topics import topics
from typing import Final

import numpy as np

__all__ = ["SOURCES", "retrieval", "sentences", "source_title", "words"]

SOURCES: Final = ("wordnet", "docstrings")
INSTALLED: Final = Path("/usr/share/wordnet")
PACKAGE: Final = "wordnet-base"
PARTS: Final = ("noun", "verb", "adj", "adv")
LIBRARIES: Final = ("networkx", "scipy", "sklearn")
FOR_RETRIEVAL: Final = {"wordnet": 8, "docstrings": 2}
"""One in this many of the texts with a name is kept for retrieval."""

EXAMPLES: Final = re.compile(r'[;:,]?\s*"')
MARKER: Final = re.compile(r"\((?:a|p|ip)\)$")
WORD: Final = re.compile(r"[A-Za-z][A-Za-z' -]{2,39}")
SENTENCE: Final = re.compile(r"(?<=\.)\s+(?=[A-Z])")
UNDERLINED: Final = re.compile(r"\n*\w[\w ]*\n\s*-{3,}\n")
PROSE: Final = re.compile(r"[^`<>{}\[\]|=_*]{30,300}")


@dataclass(frozen=True, slots=True, repr=False)
class Entry:
    """One gloss and what it explains: words, or a docstring's first line."""

    text: str
    names: tuple[str, ...]

    def is_for_retrieval(self, source: str) -> bool:
        """Return whether the text is kept for measuring, so that no student learns from it."""
        return zlib.crc32(self.text.encode()) % FOR_RETRIEVAL[source] == 0 and bool(self.names)


def sentences(count: int, seed: int, source: str = "wordnet") -> list[str]:
    """Return texts to learn from, none twice, in an order that ``seed`` decides.

    A smaller ``count`` gives the first of the same texts.

    Raises:
        ValueError: there are fewer than ``count``.
        FileNotFoundError: WordNet is not installed and cannot be fetched.
    """
    entries = _entries(source)
    kept = {entry.text for entry in entries if entry.is_for_retrieval(source)}
    found = dict.fromkeys(entry.text for entry in entries)
    return _drawn([text for text in found if text not in kept], count, seed)


def words(count: int, seed: int, source: str = "wordnet") -> list[str]:
    """Return names to learn from, in the form of questions; :func:`sentences` returns their answers.

    No question of :func:`retrieval` is among them.
    """
    entries = _entries(source)
    kept = set(chain.from_iterable(entry.names for entry in entries if entry.is_for_retrieval(source)))
    found = dict.fromkeys(chain.from_iterable(entry.names for entry in entries))
    return _drawn([name for name in found if name not in kept], count, seed)


def retrieval(count: int, seed: int, source: str = "wordnet") -> list[tuple[str, str]]:
    """Return questions, each with the one text that answers it: a word of one sense, and its gloss.

    No text and no question occurs twice.

    Raises:
        ValueError: there are fewer than ``count``.
        FileNotFoundError: WordNet is not installed and cannot be fetched.
    """
    entries = _entries(source)
    senses = Counter(chain.from_iterable(entry.names for entry in entries))
    pairs = {}
    for entry in entries:
        clear = [name for name in entry.names if senses[name] == 1]
        if entry.is_for_retrieval(source) and clear:
            pairs[entry.text] = clear[0]
    drawn = _drawn(list(pairs), count, seed)
    return [(pairs[text], text) for text in drawn]


def source_title(source: str = "wordnet") -> str:
    """Return the title of a source, for the report."""
    known = {"wordnet": f"glosses of WordNet 3.0, Debian's {PACKAGE}"}
    return known.get(source, f"docstrings of {', '.join(LIBRARIES)} and Python's manual")


def _drawn(found: Sequence[str], count: int, seed: int) -> list[str]:
    if count > len(found):
        raise ValueError(f"{count} texts asked for, and there are {len(found)}")
    order = np.random.default_rng(seed).permutation(len(found))
    return [found[at] for at in order[:count]]


@cache
def _entries(source: str) -> tuple[Entry, ...]:
    return tuple(_synsets(_wordnet()) if source == "wordnet" else _docstrings())


def _synsets(folder: Path) -> Iterator[Entry]:
    """Read the format of wndb(5WN): fields, a bar, the gloss with its examples in quotes."""
    for part in PARTS:
        for line in (folder / f"data.{part}").read_text("utf-8").splitlines():
            if line.startswith("  "):
                continue  # the licence
            fields, _, gloss = line.partition(" | ")
            _, _, _, size, *rest = fields.split(" ")
            names = (MARKER.sub("", name).replace("_", " ") for name in rest[: 2 * int(size, 16) : 2])
            definition = EXAMPLES.split(gloss, maxsplit=1)[0].strip(" ;")
            if definition:
                yield Entry(definition, tuple(name for name in names if WORD.fullmatch(name)))


def _wordnet() -> Path:
    if (INSTALLED / "data.noun").is_file():
        return INSTALLED
    kept = Path(tempfile.gettempdir()) / "sutra-wordnet"
    unpacked = kept / INSTALLED.relative_to("/")
    if not (unpacked / "data.noun").is_file():
        _unpack(kept)
    return unpacked


def _unpack(folder: Path) -> None:
    tools = [shutil.which(tool) for tool in ("apt-get", "dpkg-deb")]
    if tools[0] is None or tools[1] is None:
        raise FileNotFoundError(f"no WordNet here: install {PACKAGE} (Debian, Ubuntu) or its files")
    with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
        fetched = subprocess.run(
            [tools[0], "download", PACKAGE], cwd=aside, capture_output=True, text=True, check=False
        )
        package = next(Path(aside).glob("*.deb"), None)
        if fetched.returncode or package is None:
            raise FileNotFoundError(f"apt-get download {PACKAGE}: {fetched.stderr.strip()[-300:]}")
        subprocess.run([tools[1], "-x", str(package), f"{aside}/tree"], check=True)
        shutil.rmtree(folder, ignore_errors=True)
        Path(aside, "tree").rename(folder)  # whole, or not at all


def _docstrings() -> Iterator[Entry]:
    """Yield sentences of Python's manual, and of docstrings, whose first sentences have a name."""
    manual = chain.from_iterable(topic.split("\n\n") for topic in topics.values())
    for paragraph in manual:
        yield from (Entry(sentence, ()) for sentence in _sentences(paragraph))
    seen: set[str] = set()
    for docstring in chain.from_iterable(map(_documented, LIBRARIES)):
        title, *paragraphs = UNDERLINED.split(docstring)[0].split("\n\n")
        question = " ".join(title.split()).rstrip(".")
        for at, paragraph in enumerate(paragraphs):
            found = [sentence for sentence in _sentences(paragraph) if sentence not in seen]
            seen.update(found)
            named = (question,) if at == 0 and PROSE.fullmatch(question) else ()
            yield from (Entry(sentence, named if not row else ()) for row, sentence in enumerate(found))


def _sentences(paragraph: str) -> list[str]:
    return [text for text in SENTENCE.split(" ".join(paragraph.split())) if PROSE.fullmatch(text)]


def _documented(library: str) -> Iterator[str]:
    spec = importlib.util.find_spec(library)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"no {library} here: run ./scripts/setup")
    for file in sorted(Path(spec.origin).parent.rglob("*.py")):
        if "tests" in file.parts:
            continue
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                yield inspect.cleandoc(ast.get_docstring(node) or "")
