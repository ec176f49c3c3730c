"""Texts from an argument, a file or standard input, as the commands read them."""

from __future__ import annotations

import csv
import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedIOBase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from sutra_tasks.distillation.data.row_readers import READERS, Source, UnreadableFileError
from sutra_tasks.errors import SutraError

if TYPE_CHECKING:
    from sutra_tasks.settings import Settings

__all__ = ["read_texts", "standard_input"]

STANDARD_INPUT: Final = "-"
PATHS: Final = ("/", "./", "../", "~/")
KINDS: Final = {
    ".jsonl": READERS[".jsonl"],
    ".ndjson": READERS[".jsonl"],
    ".json": READERS[".jsonl"],
    ".csv": READERS[".csv"],
    ".tsv": READERS[".csv"],
    ".parquet": READERS[".parquet"],
}
"""How to read a file, by its suffix; any other file has a text on each line."""


def read_texts(
    source: str, options: Settings, *, encoding: str | None = None, as_jsonl: bool = False
) -> tuple[Iterator[str], int | None]:
    """Return the texts of ``source``: a file that exists, ``-`` for standard input, or else a text.

    A file is read twice: before any of its texts is returned, all of it has been found readable.

    Args:
        source: the argument of the command.
        options: with the limit of a text's length.
        encoding: of a file or of standard input; None: by its byte-order mark, else UTF-8.
        as_jsonl: whether standard input has JSON on each line, as a ``.jsonl`` file.

    Returns:
        The texts, and their number; None for what cannot be read twice, such as a pipe.

    Raises:
        SutraError: a file cannot be read, has no texts, or has one that cannot be used; it names file
            and line.
    """
    if source == STANDARD_INPUT:
        kind = ".jsonl" if as_jsonl else ""
        return _some(source, _rows("standard input", standard_input(), kind, options, encoding)), None
    path = _existing(source)
    if path is None:
        return iter([source]), 1
    if path.is_dir():
        raise SutraError(f"{source} is a folder: name a file in it")
    if not path.is_file():  # a pipe, such as the shell's <(command)
        return _some(source, _rows_of(path, options, encoding)), None
    count = sum(1 for _ in _rows_of(path, options, encoding))
    if not count:
        raise SutraError(f"{source} has no texts")
    return _rows_of(path, options, encoding), count


def standard_input() -> BufferedIOBase:
    """Return standard input as bytes.

    Raises:
        SutraError: it is closed.
    """
    if sys.stdin is None:
        raise SutraError("standard input is closed")
    return cast("BufferedIOBase", sys.stdin.buffer)


def _existing(source: str) -> Path | None:
    """Return the file that ``source`` names; None: it is a text.

    Raises:
        SutraError: it is a file's name, and there is no such file.
    """
    path = Path(source)
    if not source or "\n" in source or "\0" in source:
        return None
    try:
        path.lstat()
    except OSError as error:
        names_a_file = path.suffix.lower() in (*KINDS, ".txt") or source.startswith(PATHS)
        if error.errno != errno.ENAMETOOLONG and names_a_file:
            raise SutraError(
                f"{source}: {error.strerror}. If it is meant as a text, give it on standard input: "
                "echo ... | sutra embed -"
            ) from None
        return None
    return path


def _rows_of(path: Path, options: Settings, encoding: str | None) -> Iterator[str]:
    with _named_errors(str(path)), path.open("rb") as file:
        kind = path.suffix or path.resolve().suffix  # a link such as `latest` need not have one
        yield from _rows(str(path), file, kind.lower(), options, encoding)


def _rows(
    name: str, file: BufferedIOBase, kind: str, options: Settings, encoding: str | None
) -> Iterator[str]:
    csv.field_size_limit(options.max_text_chars)  # of this process, which is ours
    source = Source(name, file, options.max_text_chars, _Refused(), encoding)
    with _named_errors(name):
        for number, text in KINDS.get(kind, _lines)(source):
            reason = _why_refused(text)
            if reason is not None:
                source.bad.add(name, number, reason)
            yield text


def _lines(source: Source) -> Iterator[tuple[int, str]]:
    """Yield each line as a text, empty ones as well: the vectors' numbers are those of the lines."""
    for number, line in source.readable_lines():
        yield number, line.removesuffix("\n")


class _Refused:
    """Raises for the first row that cannot be used, as :class:`Source` asks."""

    def add(self, file: str, line: int, reason: str) -> None:
        """Raise."""
        remedy = ""
        if reason == "not UTF-8":
            remedy = ". Name its encoding, such as --encoding latin-1"
        raise SutraError(f"{file}:{line}: {reason}{remedy}")


def _why_refused(text: Any) -> str | None:
    if not isinstance(text, str):
        return 'expected a string, or "text" with a string'
    if "\0" in text:
        return "a NUL character: it is no text, or --encoding has to name its encoding"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "not valid Unicode"
    return None


@contextmanager
def _named_errors(name: str) -> Iterator[None]:
    try:
        yield
    except UnreadableFileError as error:
        raise SutraError(f"{name}: expected {error.expected}") from None
    except OSError as error:
        raise SutraError(f"{name}: {error.strerror or error}") from None


def _some(source: str, texts: Iterator[str]) -> Iterator[str]:
    """Yield texts, of which there must be one."""
    found = False
    for text in texts:
        found = True
        yield text
    if not found:
        raise SutraError(f"{'standard input' if source == STANDARD_INPUT else source} has no texts")
