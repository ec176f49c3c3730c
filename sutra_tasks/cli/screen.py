"""What commands show of names and reasons that come from elsewhere: no markup, no escape codes."""

from __future__ import annotations

import io
from contextlib import suppress
from typing import TextIO

from rich.text import Text

__all__ = ["Unread", "plain", "printable"]


def printable(value: object, *, keep: str = "") -> str:
    r"""Return a value's text with control characters as escapes, such as ``\x1b``.

    A terminal obeys control characters: an id could clear the screen, or turn a line around.

    Args:
        value: what to show.
        keep: control characters that stay.
    """
    return "".join(
        one if one.isprintable() or one in keep else one.encode("unicode_escape").decode()
        for one in str(value)
    )


def plain(value: object, style: str = "") -> Text:
    """Return a value for rich, which shows it as it is: ``[bold]`` stays a word in brackets."""
    return Text(printable(value), style=style)


class Unread(io.TextIOWrapper):
    """Standard error of a command that goes on when nobody reads it: a closed pipe is no error."""

    def __init__(self, stream: TextIO) -> None:
        """Write to the file of a stream, which stays open."""
        file = open(stream.fileno(), "wb", closefd=False)  # noqa: SIM115 - this object closes it
        super().__init__(file, encoding=stream.encoding, errors="backslashreplace", line_buffering=True)

    def write(self, text: str) -> int:
        """Write what can be written."""
        with suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        """Flush what can be flushed."""
        with suppress(OSError):
            super().flush()
