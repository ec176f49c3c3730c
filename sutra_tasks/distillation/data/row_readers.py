"""Reads the rows of JSONL, text, CSV and Parquet files one at a time.

Only one row is in memory. A row that cannot be read is added to :class:`BadRows`, and reading continues.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, BinaryIO, Final

from sutra_tasks.errors import InvalidOptionError

__all__ = ["READERS", "BadRow", "BadRows", "Source", "read_json_lines", "shown", "why_unusable"]

NAMED: Final = 20
"""Bad rows that are named; further ones are only counted."""

BYTES_PER_CHAR: Final = 12
"""Bytes of one character in JSON at most: two escapes such as ``\\ud83d``."""

OTHER_BYTES: Final = 65_536
"""Bytes of a line that are not its text, at most."""

CSV_MOST_CHARS: Final = 131_072
"""Characters of a field; Python's own limit, which is global to the process."""

_BOM: Final = b"\xef\xbb\xbf"


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


@dataclass(slots=True)
class Source:
    """One open file.

    Attributes:
        name: the name in error messages.
        file: open for reading bytes, at its start.
        most_chars: characters of the longest usable text; limits the length of lines.
        bad: collects the rows that cannot be read.
    """

    name: str
    file: BinaryIO
    most_chars: int
    bad: BadRows

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield numbered lines with their line ends; a line that is too long is bad and skipped."""
        most = self.most_chars * BYTES_PER_CHAR + OTHER_BYTES
        number = 0
        while line := self.file.readline(most):
            number += 1
            if number == 1:
                line = line.removeprefix(_BOM)
            if len(line) == most and not line.endswith(b"\n"):
                while (rest := self.file.readline(most)) and not rest.endswith(b"\n"):
                    pass
                self.bad.add(self.name, number, f"a line of more than {most:,} bytes")
            else:
                yield number, line


def read_json_lines(source: Source) -> Iterator[tuple[int, Any]]:
    """Yield the number and the JSON value of each line that is not blank."""
    for line, text in _decoded(source):
        if text.strip():
            try:
                yield line, json.loads(text)
            except (ValueError, RecursionError):
                source.bad.add(source.name, line, "not JSON")


def _jsonl(source: Source) -> Iterator[tuple[int, Any]]:
    for line, value in read_json_lines(source):
        yield line, value.get("text") if isinstance(value, dict) else value


def _txt(source: Source) -> Iterator[tuple[int, str]]:
    for line, text in _decoded(source):
        if text.strip():
            yield line, text.removesuffix("\n").removesuffix("\r")


def _decoded(source: Source) -> Iterator[tuple[int, str]]:
    for line, raw in source.lines():
        try:
            yield line, raw.decode()
        except UnicodeDecodeError:
            source.bad.add(source.name, line, "not UTF-8")


def _csv(source: Source) -> Iterator[tuple[int, str | None]]:
    line = 0

    def lines() -> Iterator[str]:
        nonlocal line
        for line, raw in source.lines():  # noqa: B007 - a row is named by the line on which it ends
            # A row may have several lines: escaped bytes make the row's text unusable as a whole.
            yield raw.decode(errors="surrogateescape")

    rows = csv.reader(lines(), strict=True)
    column: int | None = None
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error:
            source.bad.add(source.name, line, f"not CSV, or a field over {CSV_MOST_CHARS:,} characters")
            continue
        if column is None:
            if "text" not in row:
                raise InvalidOptionError("texts", shown(source.name), "a first row with a column text")
            column = row.index("text")
        elif row:
            yield line, row[column] if column < len(row) else None


def _parquet(source: Source) -> Iterator[tuple[int, Any]]:
    try:
        # An optional dependency: clients and fleets without distillation do not need it.
        arrow: Any = import_module("pyarrow")
        parquet: Any = import_module("pyarrow.parquet")
    except ModuleNotFoundError:
        needed = "pyarrow for Parquet files: pip install 'sutra-tasks[distill]'"
        raise InvalidOptionError("texts", shown(source.name), needed) from None
    try:
        with parquet.ParquetFile(source.file) as opened:
            if "text" not in opened.schema_arrow.names:
                raise InvalidOptionError("texts", shown(source.name), "a column text")
            line = 0
            for batch in opened.iter_batches(1_024, columns=["text"], use_threads=False):
                for cell in batch.column(0):
                    line += 1
                    yield line, _cell(cell)
    except (arrow.ArrowException, OSError):
        raise InvalidOptionError("texts", shown(source.name), "a whole Parquet file") from None


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
