"""The entries of a stream, as producers add them; ``docs/streams.md`` describes their fields. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import index
from typing import Any, Final, SupportsIndex

from sutra_tasks.errors import InvalidOptionError, InvalidTextError, TooLargeError

__all__ = [
    "LOW_PRIORITY",
    "MOST_NAME_CHARS",
    "NAME_OF_STREAM",
    "StreamEntry",
    "check_stream",
    "is_stream",
]

LOW_PRIORITY: Final = 6
"""From this priority on entries are refused first. As in Celery, 0 is the highest and 9 the lowest."""
MOST_NAME_CHARS: Final = 200
"""Length of an id, a key or a prompt's name."""
MOST_SEQ: Final = 2**53 - 1
"""Lua and JavaScript count exactly up to here."""

NAME_OF_STREAM: Final = "letters, digits, '-', '_' and '.', 64 at most"
_STREAM: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def is_stream(name: str) -> bool:
    """Say whether ``name`` can be the name of a stream."""
    return _STREAM.fullmatch(name) is not None


def check_stream(name: str) -> str:
    """Return ``name`` if it is a valid name of a stream.

    Raises:
        InvalidOptionError: it is not.
    """
    if not isinstance(name, str) or not is_stream(name):
        raise InvalidOptionError("stream", repr(name)[:80], NAME_OF_STREAM)
    return name


@dataclass(frozen=True, slots=True, repr=False)
class StreamEntry:
    """One text, or one piece of a text that is being written.

    Attributes:
        text: may be empty for a piece that only ends its text.
        id: names the text in the output; None: the entry's id in the stream does. A whole number counts
            as its decimal digits: 42 and "42" are the same id.
        key: names the text to which this piece belongs; None: the entry is a whole text. It may be a
            whole number as well.
        end: whether the text of ``key`` ends with this piece.
        seq: the piece's number in its text, from 0, by which a piece that is sent twice is dropped.
        priority: 0 to 9, as in Celery; from 6 on the entry is refused while backpressure is severe.
        prompt: one of the model's named prompts; of several pieces the first one's counts.
    """

    text: str
    id: str | int | None = None
    key: str | int | None = None
    end: bool = False
    seq: int | None = None
    priority: int = 0
    prompt: str | None = None

    def __repr__(self) -> str:
        name = self.key if self.id is None else self.id
        return f"<StreamEntry {'' if name is None else name} {len(self.text)} characters>"

    def checked(self, most_chars: int) -> StreamEntry:
        """Return this entry, with its names as strings, if it can be embedded.

        Args:
            most_chars: characters that ``text`` may have.

        Raises:
            InvalidInputError: it names the field at fault.
        """
        if not isinstance(self.text, str):
            raise InvalidTextError(0, f"a str is needed, not {type(self.text).__name__}")
        if len(self.text) > most_chars:
            raise TooLargeError(
                "characters in an entry", len(self.text), most_chars, "SUTRA_MAX_TEXT_CHARS"
            )
        names = {name: _digits(getattr(self, name)) for name in ("id", "key")}
        for name, value in {**names, "prompt": self.prompt}.items():
            if value is not None and (
                not isinstance(value, str) or not 0 < len(value) <= MOST_NAME_CHARS
            ):
                what = "characters" if name == "prompt" else "characters, or a whole number"
                raise InvalidOptionError(name, _shown(value), f"1 to {MOST_NAME_CHARS} {what}")
        if type(self.priority) is not int or not 0 <= self.priority <= 9:  # noqa: PLR2004
            raise InvalidOptionError("priority", _shown(self.priority), "a whole number, 0 to 9")
        if self.seq is not None and (type(self.seq) is not int or not 0 <= self.seq <= MOST_SEQ):
            raise InvalidOptionError("seq", _shown(self.seq), f"a whole number, 0 to {MOST_SEQ}")
        if self.key is None and (self.end or self.seq is not None):
            raise InvalidOptionError("end" if self.end else "seq", "...", "a key beside it")
        for value in (self.text, *names.values(), self.prompt):
            _check_unicode(value or "")
        is_as_it_goes = names["id"] is self.id and names["key"] is self.key
        return self if is_as_it_goes else replace(self, **names)

    def fields(self) -> list[str]:
        """Return the fields for ``XADD``: names and values in turn."""
        found = ["text", self.text]
        for name in ("id", "key", "prompt", "seq"):
            value = getattr(self, name)
            if value is not None:
                found += [name, str(value)]
        if self.end:
            found += ["end", "1"]
        if self.priority:
            found += ["priority", str(self.priority)]
        return found

    @classmethod
    def parse(cls, fields: Sequence[bytes], most_chars: int) -> StreamEntry:
        """Read an entry that any producer wrote, and check it.

        Args:
            fields: names and values in turn, as ``XADD`` was given them.
            most_chars: characters that ``text`` may have.

        Raises:
            InvalidInputError: it is no entry, or cannot be embedded. The message holds no word of the
                text.
        """
        found: dict[str, Any] = {}
        for at in range(0, len(fields) - 1, 2):
            name = fields[at].decode(errors="replace")
            if name in _PARSERS:
                try:
                    found[name] = _PARSERS[name](fields[at + 1])
                except UnicodeDecodeError as error:
                    raise InvalidTextError(0, f"{name} is not UTF-8 at byte {error.start}") from None
                except ValueError:
                    raise InvalidOptionError(name, "...", "a whole number") from None
        if "text" not in found:
            known = ", ".join(_PARSERS)
            raise InvalidTextError(0, f"an entry needs a field text; known are {known}")
        return cls(**found).checked(most_chars)


def _digits(value: Any) -> Any:
    """Return the decimal digits of a whole number, of Python or numpy; any other value as it is."""
    if isinstance(value, str | bool | None) or not isinstance(value, SupportsIndex):
        return value
    try:
        return str(index(value))
    except (TypeError, ValueError):  # Python refuses to format very large integers
        return value


def _check_unicode(value: str) -> None:
    try:
        if not value.isascii():  # Python knows this of a str: most texts need no encoding
            value.encode()
    except UnicodeEncodeError as error:
        reason = f"a lone surrogate at character {error.start} is not valid Unicode"
        raise InvalidTextError(0, reason) from None


def _shown(value: object) -> str:
    try:
        return repr(value)[:50]
    except ValueError:  # Python refuses to format very large integers
        return "..."


def _str_or_none(value: bytes) -> str | None:
    return value.decode() or None


def _natural(value: bytes) -> int:
    if not value.isdigit():  # int() accepts "1_0" and " 1 " as well
        raise ValueError
    return int(value)


_PARSERS: Final[Mapping[str, Callable[[bytes], Any]]] = {
    "text": bytes.decode,
    "id": _str_or_none,
    "key": _str_or_none,
    "end": lambda value: value in (b"1", b"true"),
    "seq": lambda value: _natural(value) if value else None,
    "priority": lambda value: _natural(value or b"0"),
    "prompt": _str_or_none,
}
