"""Bytes become lines whatever their byte-order mark, encoding, line ends, and however they arrive."""

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sutra_tasks.decoding import UNREADABLE, decoded, lines, text_encoding

CONTENT = "one é\r\ntwo\r\nthree\r\n\r\nlast 🙂"
LINES = ["one é\n", "two\n", "three\n", "\n", "last 🙂"]


def pieces(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


def lines_of(
    data: bytes, size: int = 5, encoding: str | None = None, most: int = 100
) -> list[str | None]:
    numbered = list(lines(decoded(pieces(data, size), encoding), most))
    assert [number for number, _ in numbered] == list(range(1, len(numbered) + 1))
    return [line for _, line in numbered]


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_byte_order_mark_names_the_encoding_and_any_line_end_ends_a_line(
    size: int, encoding: str, end: str
) -> None:
    data = CONTENT.replace("\r\n", end).encode(encoding)
    assert lines_of(data, size) == LINES


@pytest.mark.parametrize("byte_order", ["utf-16-be", "utf-32-be"])
def test_a_byte_order_mark_tells_the_byte_order(byte_order: str) -> None:
    assert lines_of(("\ufeff" + CONTENT).encode(byte_order)) == LINES


@given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(1, 7))
def test_text_is_the_same_however_its_bytes_arrive(text: str, size: int) -> None:
    expected = text.removeprefix("\ufeff")
    assert "".join(decoded(pieces(text.encode(), size))) == expected


@pytest.mark.parametrize("size", [1, 2, 1000])
def test_bytes_that_are_no_characters_mark_their_line_and_no_other(size: int) -> None:
    data = b"one\ncaf\xe9\nthree"
    assert lines_of(data, size) == ["one\n", f"caf{UNREADABLE}\n", "three"]
    assert lines_of(data, size, "latin-1") == ["one\n", "café\n", "three"]
    assert lines_of(b"\xef\xbb", size) == [UNREADABLE]


def test_nothing_has_no_lines() -> None:
    assert lines_of(b"") == []
    assert lines_of(b"\xef\xbb\xbf") == []
    assert lines_of(b"\n") == ["\n"]


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_line_that_is_too_long_is_left_out_and_those_after_it_are_not(size: int) -> None:
    assert lines_of(b"ab\n" + b"x" * 50 + b"\ncd\n" + b"y" * 50, size, most=10) == [
        "ab\n",
        None,
        "cd\n",
        None,
    ]


def test_what_is_typed_is_there_before_the_next_line_is() -> None:
    def typed() -> Iterator[bytes]:
        yield b"one\n"
        raise AssertionError("the line was not used as it came")

    assert next(lines(decoded(typed()), 100)) == (1, "one\n")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("latin-1", "iso8859-1"),
        ("UTF16", "utf-16"),
        *dict.fromkeys(("base64", "rot13", "no", "")).items(),
    ],
)
def test_only_encodings_of_text_are_encodings(name: str, found: str | None) -> None:
    assert text_encoding(name) == found
