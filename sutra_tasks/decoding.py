"""Decodes files and pipes as people have them: byte-order marks, encodings and all line ends."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterable, Iterator
from typing import Final

__all__ = ["UNREADABLE", "decoded", "lines", "text_encoding"]

UNREADABLE: Final = "\udcff"
"""Stands for bytes that are no characters of the encoding; it is no character itself."""

_HANDLER: Final = "sutra.unreadable"
_MARKS: Final = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_MARK: Final = "\ufeff"


def _unreadable(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return UNREADABLE, error.end


codecs.register_error(_HANDLER, _unreadable)


def text_encoding(name: str) -> str | None:
    """Return Python's name of a text encoding, such as ``latin-1``; None: there is none."""
    try:
        "".encode(name)  # refuses codecs from bytes to bytes, such as base64
        return codecs.lookup(name).name
    except (LookupError, ValueError):
        return None


def decoded(parts: Iterable[bytes], encoding: str | None = None) -> Iterator[str]:
    """Yield the text of a file or a pipe as its bytes come, without its byte-order mark.

    Args:
        parts: the bytes, in order.
        encoding: of the text; None: the one that its byte-order mark tells, else UTF-8.

    Yields:
        Text in which :data:`UNREADABLE` stands for bytes that the encoding does not have.
    """
    decoder: codecs.IncrementalDecoder | None = None
    head, begun = b"", False
    for part in _and_an_end(parts):
        data = head + part
        if decoder is None:
            name = encoding or _told_by_mark(data, at_end=not part)
            if name is None:  # too few bytes to tell
                head = data
                continue
            decoder, head = codecs.getincrementaldecoder(name)(_HANDLER), b""
        text = decoder.decode(data, final=not part)
        if text:
            yield text if begun else text.removeprefix(_MARK)
            begun = True


def _and_an_end(parts: Iterable[bytes]) -> Iterator[bytes]:
    yield from (part for part in parts if part)
    yield b""


def _told_by_mark(head: bytes, *, at_end: bool) -> str | None:
    if not at_end and any(len(head) < len(mark) and mark.startswith(head) for mark, _ in _MARKS):
        return None
    return next((name for mark, name in _MARKS if head.startswith(mark)), "utf-8")


def lines(
    parts: Iterable[str], most_chars: int, *, as_they_are: bool = False
) -> Iterator[tuple[int, str | None]]:
    r"""Yield the lines of a text, numbered from 1; a line ends with ``\n``, ``\r\n`` or ``\r``.

    Args:
        parts: the text, in order.
        most_chars: of a line.
        as_they_are: whether a line keeps its ``\r``, and only ``\n`` ends one: in CSV a text may have
            either.

    Yields:
        The line, which ends with ``\n`` unless it is an unfinished last one; None in place of a line
        that is too long, which is never whole in memory.
    """
    newlines = io.IncrementalNewlineDecoder(None, translate=not as_they_are)
    number, rest, too_long = 1, "", False
    for part in parts:
        *whole, rest = (rest + newlines.decode(part)).split("\n")
        for line in whole:
            yield number, None if too_long or len(line) > most_chars else line + "\n"
            number, too_long = number + 1, False
        if len(rest) > most_chars:
            rest, too_long = "", True
    rest += newlines.decode("", final=True)
    if rest or too_long:
        yield number, None if too_long else rest
