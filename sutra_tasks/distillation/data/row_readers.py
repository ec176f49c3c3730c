"""Reads the rows of JSONL, text, CSV and Parquet files one at a time.

Only one row is in memory. A row that cannot be read is given to :class:`BadRows`, and reading continues.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from io import BufferedIOBase
from typing import Any, Final, Protocol

from sutra_tasks.decoding import UNREADABLE, decoded, lines

__all__ = [
    "READERS",
    "BadRow",
    "BadRows",
    "Source",
    "UnreadableFileError",
    "read_json_lines",
    "shown",
    "why_unusable",
]

NAMED: Final = 20
"""Bad rows that are named; further ones are only counted."""

ESCAPED_CHARS: Final = 12
"""Characters that JSON has for one character at most: two escapes such as ``\\ud83d``."""

OTHER_CHARS: Final = 65_536
"""Characters of a line that are not its text, at most."""

READ_BYTES: Final = 65_536

DELIMITERS: Final = ",;\t|"
"""Of a CSV file: the first of them that makes ``text`` one of its columns."""


class UnreadableFileError(Exception):
    """A file as a whole is not what its name says; ``expected`` says what it should have."""

    def __init__(self, expected: str) -> None:
        super().__init__(expected)
        self.expected = expected


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that could not be used: its file, its line counted from 1, and the reason."""

    file: str
    line: int
    reason: str


@dataclass(slots=True)
class BadRows:
    """Counts the rows that cannot be used, and keeps the first :data:`NAMED`."""

    count: int = 0
    first: list[BadRow] = field(default_factory=list)

    def add(self, file: str, line: int, reason: str) -> None:
        """Count a row."""
        self.count += 1
        if len(self.first) < NAMED:
            self.first.append(BadRow(file, line, reason))


class _TakesBadRows(Protocol):
    def add(self, file: str, line: int, reason: str) -> None: ...


@dataclass(slots=True)
class Source:
    """One open file.

    Attributes:
        name: the name in error messages.
        file: open for reading bytes, at its start.
        most_chars: characters of the longest usable text; limits the length of lines.
        bad: is told of the rows that cannot be read.
        encoding: of the file; None: the one that its byte-order mark tells, else UTF-8.
    """

    name: str
    file: BufferedIOBase
    most_chars: int
    bad: _TakesBadRows
    encoding: str | None = None

    def lines(self, *, as_they_are: bool = False) -> Iterator[tuple[int, str]]:
        """Yield numbered lines; a line that is too long is bad and skipped."""
        most = self.most_chars * ESCAPED_CHARS + OTHER_CHARS
        # read1: a pipe's lines are used as they come.
        parts = iter(lambda: self.file.read1(READ_BYTES), b"")
        for number, line in lines(decoded(parts, self.encoding), most, as_they_are=as_they_are):
            if line is None:
                self.bad.add(self.name, number, f"a line of more than {most:,} characters")
            else:
                yield number, line

    def readable_lines(self) -> Iterator[tuple[int, str]]:
        """Yield the lines that the encoding has; the others are bad."""
        for number, line in self.lines():
            if UNREADABLE in line:
                self.bad.add(self.name, number, f"not {(self.encoding or 'utf-8').upper()}")
            else:
                yield number, line


def read_json_lines(source: Source) -> Iterator[tuple[int, Any]]:
    """Yield the number and the JSON value of each line that is not blank."""
    for line, text in source.readable_lines():
        if text.strip():
            try:
                yield line, json.loads(text)
            except (ValueError, RecursionError):
                source.bad.add(source.name, line, "not JSON")


def _jsonl(source: Source) -> Iterator[tuple[int, Any]]:
    for line, value in read_json_lines(source):
        yield line, value.get("text") if isinstance(value, dict) else value


def _txt(source: Source) -> Iterator[tuple[int, str]]:
    for line, text in source.readable_lines():
        if text.strip():
            yield line, text.removesuffix("\n")


def _csv(source: Source) -> Iterator[tuple[int, str | None]]:
    # A row may have several lines: unreadable bytes make the row's text unusable as a whole.
    numbered = source.lines(as_they_are=True)
    first = next(numbered, None)
    if first is None:
        return
    found = _column(first[1])
    if found is None:
        raise UnreadableFileError("a first row with a column text")
    line, (column, delimiter) = 1, found

    def rest() -> Iterator[str]:
        nonlocal line
        for line, text in numbered:  # noqa: B007 - a row is named by the line on which it ends
            yield text

    rows = csv.reader(rest(), strict=True, delimiter=delimiter)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error:
            most = csv.field_size_limit()  # Python's own limit, which is global to the process
            source.bad.add(source.name, line, f"not CSV, or a field over {most:,} characters")
            continue
        if row:
            yield line, row[column] if column < len(row) else None


def _column(head: str) -> tuple[int, str] | None:
    """Return where the column ``text`` is in a CSV file's first line, and the file's delimiter."""
    for delimiter in DELIMITERS:
        names = next(csv.reader([head], delimiter=delimiter), [])
        if "text" in names:
            return names.index("text"), delimiter
    return None


def _parquet(source: Source) -> Iterator[tuple[int, Any]]:
    try:
        # An optional dependency: clients and fleets without distillation do not need it.
        arrow: Any = import_module("pyarrow")
        parquet: Any = import_module("pyarrow.parquet")
    except ModuleNotFoundError:
        needed = "pyarrow for Parquet files: pip install 'sutra-tasks[distill]'"
        raise UnreadableFileError(needed) from None
    try:
        with parquet.ParquetFile(source.file) as opened:
            if "text" not in opened.schema_arrow.names:
                raise UnreadableFileError("a column text")
            line = 0
            for batch in opened.iter_batches(1_024, columns=["text"], use_threads=False):
                for cell in batch.column(0):
                    line += 1
                    yield line, _cell(cell)
    except (arrow.ArrowException, OSError):
        raise UnreadableFileError("a whole Parquet file") from None


def _cell(cell: Any) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError:
        return "\ud800"  # unusable as a text, with the same reason as in other kinds of files


READERS: Final[dict[str, Callable[[Source], Iterator[tuple[int, Any]]]]] = {
    ".jsonl": _jsonl,
    ".txt": _txt,
    ".csv": _csv,
    ".parquet": _parquet,
}
"""By suffix: each yields a line number, counted from 1, and a value that should be a text."""


def why_unusable(text: Any, most_chars: int) -> str | None:
    """Return the reason why a value is not a usable text; None if it is one."""
    if not isinstance(text, str):
        return "no text"
    if not text.strip():
        return "empty"
    if len(text) > most_chars:
        return f"over {most_chars:,} characters"
    if "\0" in text:
        return "a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "not valid Unicode"
    return None


def shown(name: str) -> str:
    """Return a name as error messages show it."""
    return json.dumps(name)[:80]
