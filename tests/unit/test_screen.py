"""Names and reasons from elsewhere reach a terminal as they are: no markup, no escape codes."""

import io
import os

import pytest
from rich.console import Console
from rich.table import Table

from sutra_tasks.cli.screen import Unread, plain, printable
from sutra_tasks.cli.stream_status import _dead_table


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("gpu0 é 三 🙂", "gpu0 é 三 🙂"),
        ("[bold]a[/] [Errno 13]", "[bold]a[/] [Errno 13]"),
        ("a\x1b[2Jb\x07\r\n", r"a\x1b[2Jb\x07\r\n"),
        ("a\u202eb", r"a\u202eb"),  # turns the rest of a line around
        ("a\x9b2Jb", r"a\x9b2Jb"),  # an escape code in one character
        ("a\ud800b", r"a\ud800b"),
        (7, "7"),
    ],
)
def test_a_value_is_shown_as_it_is(value: object, shown: str) -> None:
    assert printable(value) == shown
    out = io.StringIO()
    table = Table(box=None, show_header=False)
    table.add_column()
    table.add_row(plain(value))
    Console(file=out, width=80).print(table)
    assert out.getvalue().strip() == shown


def test_line_ends_can_stay() -> None:
    assert printable("a\nb\x1b", keep="\n") == "a\nb\\x1b"


def test_a_dead_entry_may_have_any_name_and_reason() -> None:
    out = io.StringIO()
    letter = (b"1-0", {b"id": b"[red]\xff\x1b", b"reason": b"\xfe[/]"})
    Console(file=out, width=80).print(_dead_table([letter]))
    assert "[red]\ufffd\\x1b" in out.getvalue()
    assert "\ufffd[/]" in out.getvalue()


def test_writing_goes_on_when_nobody_reads() -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream:
        console = Console(file=Unread(stream))
        console.print("read")
        os.close(reader)
        console.print("unread")
        console.print("unread, too")
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
