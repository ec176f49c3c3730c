"""Texts to learn from and to measure on, out of the files of one folder.

A row that cannot be used is counted and named by file and line, never by what it says; the others are
read on. No file outside the folder is read, whatever its name or links say.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from sutra_tasks.distillation.data.row_readers import (
    READERS,
    BadRow,
    BadRows,
    Source,
    read_json_lines,
    shown,
    why_unusable,
)
from sutra_tasks.distillation.data.traffic_sample import priority
from sutra_tasks.errors import InvalidOptionError, TooLittleTextError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["BadRow", "BadRows", "Corpus", "read_corpus", "read_pairs", "split_corpus"]


@dataclass(frozen=True, slots=True, repr=False)
class Corpus:
    """Texts, and what was wrong with the files.

    Attributes:
        texts: all different, in the order in which they were first seen.
        bad: the first rows that could not be used.
        bad_rows: how many there were.
        duplicates: rows whose text was kept already.
    """

    texts: tuple[str, ...]
    bad: tuple[BadRow, ...] = ()
    bad_rows: int = 0
    duplicates: int = 0

    def __repr__(self) -> str:
        return f"<Corpus {len(self.texts)} texts, {self.bad_rows} bad rows>"


def read_corpus(
    folder: Path,
    names: Sequence[str],
    *,
    most_chars: int,
    sample: Iterable[str] = (),
    most_texts: int | None = None,
    rng: np.random.Generator | None = None,
) -> Corpus:
    """Read files of ``folder``, and a sample beside them; memory is that of the texts that are kept.

    ``.jsonl``: a string, or an object with ``text``, a line; ``.txt``: a text a line; blank lines are
    skipped. ``.csv`` and ``.parquet``: the column ``text``. All in UTF-8.

    Args:
        folder: where the files are, ``SUTRA_DATA_DIR``.
        names: of files in it, relative.
        most_chars: rows with longer texts are bad.
        sample: further texts; those that cannot be used are left out.
        most_texts: of more, a uniform draw of the different texts is kept: those with the least keyed
            hash (Cohen and Kaplan, 2007), so that a text that is there often is no likelier to be drawn.
            ``duplicates`` then counts copies of texts that were kept when they came.
        rng: draws the hash's key; needed with ``most_texts``.

    Raises:
        InvalidOptionError: ``texts`` names what is no readable file in the folder, or a file of a kind
            that is not known, or without the column; or pyarrow is missing for ``.parquet``.
    """
    kept, bad = _Kept(most_texts, b"" if rng is None else rng.bytes(16)), BadRows()
    for name in names:
        path, read_rows = _inside(folder, name, "texts"), READERS[PurePosixPath(name).suffix.lower()]
        try:
            with path.open("rb") as file:
                for line, value in read_rows(Source(name, file, most_chars, bad)):
                    reason = why_unusable(value, most_chars)
                    if reason is None:
                        kept.add(value)
                    else:
                        bad.add(name, line, reason)
        except OSError:
            raise _no_file(name, "texts") from None
    duplicates = kept.duplicates
    for text in sample:
        if why_unusable(text, most_chars) is None:
            kept.add(text)
    return Corpus(kept.texts(), tuple(bad.first), bad.count, duplicates)


def split_corpus(
    corpus: Corpus, held_out: int, seed: int, least_ratio: int = 2, *, left_out: int = 0
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the texts to learn from and the ``held_out`` to measure on, each in the corpus' order.

    Held out are the texts with the least hash of seed and text. So the order of files does not matter,
    and where files only grow, a text that was learned from is never held out later.

    Args:
        corpus: the texts.
        held_out: how many are held out.
        seed: with another, others are.
        least_ratio: texts to learn from for each that is held out, at the least.
        left_out: texts that were found and are not among them, for labelled pairs hold them.

    Raises:
        TooLittleTextError: there are fewer.
    """
    needed = held_out * (1 + least_ratio)
    if len(corpus.texts) < needed:
        raise TooLittleTextError(len(corpus.texts), needed, corpus.bad_rows, left_out)
    key = f"held out {seed}".encode()
    least = set(heapq.nsmallest(held_out, corpus.texts, key=lambda text: (priority(text, key), text)))
    return (
        tuple(text for text in corpus.texts if text not in least),
        tuple(text for text in corpus.texts if text in least),
    )


def read_pairs(
    folder: Path, name: str, *, most_chars: int = 100_000, bad: BadRows | None = None
) -> list[tuple[str, str]]:
    """Return labelled pairs of a JSONL file: ``query`` and ``positive`` of the object on each line.

    Args:
        folder: as for :func:`read_corpus`.
        name: of the file.
        most_chars: rows with longer texts are bad.
        bad: told of rows that cannot be used.

    Raises:
        InvalidOptionError: ``pairs`` names no readable JSONL file in the folder, or one without pairs.
    """
    path, bad = _inside(folder, name, "pairs", kinds=(".jsonl",)), BadRows() if bad is None else bad
    pairs = []
    try:
        with path.open("rb") as file:
            for line, value in read_json_lines(Source(name, file, 2 * most_chars, bad)):
                row = value if isinstance(value, dict) else {}
                query, positive = row.get("query"), row.get("positive")
                reason = why_unusable(query, most_chars) or why_unusable(positive, most_chars)
                if reason is None:
                    pairs.append((str(query), str(positive)))
                else:
                    bad.add(name, line, f"query and positive: {reason}")
    except OSError:
        raise _no_file(name, "pairs") from None
    if not pairs:
        raise InvalidOptionError("pairs", shown(name), "objects with query and positive, one a line")
    return pairs


class _Kept:
    """Different texts: all, or a bounded uniform draw of them."""

    def __init__(self, most: int | None, key: bytes) -> None:
        self.duplicates = 0
        self._most, self._key, self._seen = most, key, 0
        self._order: dict[str, int] = {}
        self._heap: list[tuple[float, str]] = []  # the largest place first

    def add(self, text: str) -> None:
        if text in self._order:
            self.duplicates += 1
            return
        if self._most is not None:
            place = (-priority(text, self._key), text)
            if len(self._heap) < self._most:
                heapq.heappush(self._heap, place)
            else:
                _, gone = heapq.heappushpop(self._heap, place)
                if gone == text:
                    return
                del self._order[gone]
        self._seen += 1
        self._order[text] = self._seen

    def texts(self) -> tuple[str, ...]:
        return tuple(self._order)


def _inside(folder: Path, name: str, option: str, kinds: Sequence[str] = tuple(READERS)) -> Path:
    parts = PurePosixPath(name)
    if parts.suffix.lower() not in kinds:
        raise InvalidOptionError(option, shown(name), f"a file of a known kind: {', '.join(kinds)}")
    if parts.is_absolute() or ".." in parts.parts:
        raise _no_file(name, option)
    try:
        root = folder.resolve(strict=True)
        path = (root / parts).resolve(strict=True)
        # One answer to all: what is outside the folder is not told from what is nowhere.
        if path.is_relative_to(root) and path.is_file():
            return path
    except (OSError, ValueError, RuntimeError):
        pass
    raise _no_file(name, option)


def _no_file(name: str, option: str) -> InvalidOptionError:
    return InvalidOptionError(option, shown(name), "a file that can be read, inside SUTRA_DATA_DIR")
