"""Reads texts and labelled pairs from the files of one folder, and divides texts into two sets.

A row that cannot be used is counted and named by file and line, never by its text; the other rows are
used. No file outside the folder is read, whatever a name or a link says.
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
    UnreadableFileError,
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
    """Texts, and the rows of the files that could not be used.

    Attributes:
        texts: distinct texts, in the order in which they were first seen.
        bad: the first rows that could not be used.
        bad_rows: number of all rows that could not be used.
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
    """Read the texts of files, and of a sample; only the texts that are kept take up memory.

    ``.jsonl``: on each line a string, or an object with ``text``; ``.txt``: a text on each line; blank
    lines are skipped. ``.csv`` and ``.parquet``: the column ``text``. All in UTF-8, or as a file's
    byte-order mark says.

    Args:
        folder: the folder of the files, ``SUTRA_DATA_DIR``.
        names: of the files, relative to the folder.
        most_chars: rows with longer texts are bad.
        sample: further texts; unusable ones are left out without counting them.
        most_texts: of more texts, a uniform draw of distinct ones is kept: those of lowest keyed hash
            (Cohen and Kaplan, 2007), so that repeated texts are not drawn more often. ``duplicates``
            then counts only copies of texts that were kept when the copy was read.
        rng: draws the hash's key; required with ``most_texts``.

    Raises:
        InvalidOptionError: a name is not a readable file in the folder, the kind of file is unknown, the
            column is missing, or pyarrow is missing for ``.parquet``.
    """
    draw, bad = _Draw(most_texts, b"" if rng is None else rng.bytes(16)), BadRows()
    for name in names:
        path, read_rows = _inside(folder, name, "texts"), READERS[PurePosixPath(name).suffix.lower()]
        try:
            with path.open("rb") as file:
                for line, value in read_rows(Source(name, file, most_chars, bad)):
                    reason = why_unusable(value, most_chars)
                    if reason is None:
                        draw.add(value)
                    else:
                        bad.add(name, line, reason)
        except UnreadableFileError as error:
            raise InvalidOptionError("texts", shown(name), error.expected) from None
        except OSError:
            raise _no_file(name, "texts") from None
    duplicates = draw.duplicates
    for text in sample:
        if why_unusable(text, most_chars) is None:
            draw.add(text)
    return Corpus(draw.texts(), tuple(bad.first), bad.count, duplicates)


def split_corpus(
    corpus: Corpus, held_out: int, seed: int, least_ratio: int = 2, *, left_out: int = 0
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the texts to learn from and the texts to measure on, each in the order of the corpus.

    The texts of lowest hash are held out to measure on. So the order of files does not matter, and if
    files only grow, a text that was learned from is never held out later.

    Args:
        corpus: the texts.
        held_out: number of texts to measure on.
        seed: another seed holds out other texts.
        least_ratio: least number of texts to learn from for each text that is held out.
        left_out: texts that are missing in ``corpus`` because labelled pairs have them; for the error.

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
    """Return the labelled pairs of a JSONL file: ``query`` and ``positive`` of the object on each line.

    Args:
        folder: as for :func:`read_corpus`.
        name: of the file.
        most_chars: rows with longer texts are bad.
        bad: collects the rows that cannot be used.

    Raises:
        InvalidOptionError: the name is not a readable JSONL file in the folder, or the file has no pair.
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


class _Draw:
    """Distinct texts: all of them, or a bounded uniform draw."""

    def __init__(self, most: int | None, key: bytes) -> None:
        self.duplicates = 0
        self._most, self._key, self._seen = most, key, 0
        self._order: dict[str, int] = {}
        self._heap: list[tuple[float, str]] = []  # the highest priority first

    def add(self, text: str) -> None:
        if text in self._order:
            self.duplicates += 1
            return
        if self._most is not None:
            entry = (-priority(text, self._key), text)
            if len(self._heap) < self._most:
                heapq.heappush(self._heap, entry)
            else:
                _, dropped = heapq.heappushpop(self._heap, entry)
                if dropped == text:
                    return
                del self._order[dropped]
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
        # The same error for files outside the folder and missing files, so that names reveal nothing.
        if path.is_relative_to(root) and path.is_file():
            return path
    except (OSError, ValueError, RuntimeError):
        pass
    raise _no_file(name, option)


def _no_file(name: str, option: str) -> InvalidOptionError:
    return InvalidOptionError(option, shown(name), "a file that can be read, inside SUTRA_DATA_DIR")
