"""Entries of a stream: round trips, what raw producers write, and what is refused."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as laws
from hypothesis import strategies as st

from sutra_tasks.errors import (
    InvalidInputError,
    InvalidOptionError,
    InvalidTextError,
    TooLargeError,
)
from sutra_tasks.streaming.entries import (
    MOST_NAME_CHARS,
    MOST_SEQ,
    StreamEntry,
    check_stream,
)

MOST_CHARS = 1000
SECRET = "secret words"
HUGE = pytest.param(10**5000, id="huge")  # Python refuses to format it
TEXTS = st.text(st.characters(codec="utf-8"), max_size=60)
NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
ALONE = st.builds(
    StreamEntry, TEXTS, id=st.none() | NAMES, priority=st.integers(0, 9), prompt=st.none() | NAMES
)
PIECES = st.builds(
    StreamEntry,
    TEXTS,
    id=st.none() | NAMES,
    key=NAMES,
    end=st.booleans(),
    seq=st.none() | st.integers(0, MOST_SEQ),
    priority=st.integers(0, 9),
    prompt=st.none() | NAMES,
)


def wire(fields: Sequence[str]) -> list[bytes]:
    return [field.encode() for field in fields]


def parsed(*fields: bytes) -> StreamEntry:
    return StreamEntry.parse(fields, MOST_CHARS)


def check_silent(error: BaseException) -> None:
    """See that no word of the text is said."""
    for word in SECRET.split():
        assert word not in f"{error} {error!r} {error.args}"


@laws(max_examples=60)
@given(entry=ALONE | PIECES)
def test_an_entry_survives_the_stream(entry: StreamEntry) -> None:
    assert entry.checked(MOST_CHARS) is entry
    assert StreamEntry.parse(wire(entry.fields()), MOST_CHARS) == entry


def test_what_is_usual_is_not_written() -> None:
    assert StreamEntry("some").fields() == ["text", "some"]
    piece = StreamEntry("", id="1", key="k", end=True, seq=0, priority=6, prompt="query")
    assert dict(zip(piece.fields()[::2], piece.fields()[1::2], strict=True)) == {
        "text": "",
        "id": "1",
        "key": "k",
        "end": "1",
        "seq": "0",
        "priority": "6",
        "prompt": "query",
    }


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ([b"text", b"some"], StreamEntry("some")),
        ([b"text", "né 世界".encode()], StreamEntry("né 世界")),
        ([b"colour", b"\xff", b"text", b"some", b"\xfe", b"1"], StreamEntry("some")),
        ([b"text", b"one", b"id", b"a", b"text", b"two"], StreamEntry("two", id="a")),  # the last
        ([b"text", b"some", b"id"], StreamEntry("some")),  # no value
        ([b"text", b""], StreamEntry("")),
        (
            b"text|empty|id||key||seq||priority||prompt||end|".split(b"|"),
            StreamEntry("empty"),
        ),
        ([b"text", b"a", b"key", b"k", b"end", b"1"], StreamEntry("a", key="k", end=True)),
        ([b"text", b"a", b"key", b"k", b"end", b"true"], StreamEntry("a", key="k", end=True)),
        ([b"text", b"a", b"key", b"k", b"end", b"0"], StreamEntry("a", key="k")),
        ([b"text", b"a", b"key", b"k", b"seq", b"007"], StreamEntry("a", key="k", seq=7)),
        ([b"text", b"a", b"priority", b"9"], StreamEntry("a", priority=9)),
        ([b"text", b"x" * MOST_CHARS], StreamEntry("x" * MOST_CHARS)),
        ([b"text", "世".encode() * MOST_CHARS], StreamEntry("世" * MOST_CHARS)),  # not its bytes
    ],
)  # fmt: skip
def test_raw_producers_are_understood(fields: list[bytes], expected: StreamEntry) -> None:
    assert parsed(*fields) == expected


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ([], InvalidTextError, "needs a field text"),
        ([b"body", b"x"], InvalidTextError, "known are text, id"),
        ([b"text"], InvalidTextError, "needs a field text"),
        ([b"TEXT", b"x"], InvalidTextError, "needs a field text"),
        ([b"text", SECRET.encode() + b"\xff"], InvalidTextError, "text is not UTF-8 at byte 12"),
        ([b"text", b"\xed\xa0\x80"], InvalidTextError, "text is not UTF-8"),  # a surrogate
        ([b"text", b"x", b"id", b"\xff"], InvalidTextError, "id is not UTF-8"),
        ([b"text", b"x" * (MOST_CHARS + 1)], TooLargeError, "1,001 is over the limit of 1,000"),
        ([b"text", b"x", b"end", b"1"], InvalidOptionError, "end=...: expected a key"),
        ([b"text", b"x", b"seq", b"0"], InvalidOptionError, "seq=...: expected a key"),
        ([b"text", b"x", b"key", b"", b"end", b"1"], InvalidOptionError, "a key"),
        ([b"text", b"x", b"key", b"k" * (MOST_NAME_CHARS + 1)], InvalidOptionError, "key="),
        ([b"text", b"x", b"id", b"k" * (MOST_NAME_CHARS + 1)], InvalidOptionError, "id="),
        ([b"text", b"x", b"prompt", b"k" * (MOST_NAME_CHARS + 1)], InvalidOptionError, "prompt="),
        ([b"text", b"x", b"priority", b"10"], InvalidOptionError, "priority=10: expected"),
        ([b"text", b"x", b"priority", b"high"], InvalidOptionError, "priority="),
    ],
)
def test_what_raw_producers_get_wrong_is_refused(
    fields: list[bytes], error: type[InvalidInputError], says: str
) -> None:
    with pytest.raises(InvalidInputError) as refused:
        parsed(*fields)
    assert type(refused.value) is error
    assert says in str(refused.value)
    check_silent(refused.value)


@pytest.mark.parametrize("name", [b"seq", b"priority"])
@pytest.mark.parametrize(
    "value",
    [
        *(b"-1", b"+1", b"1.0", b"1e3", b"0x1", b"1_0", b" 1", b"1\n", b"\xff", b"x"),
        "١٢".encode(),
        "²".encode(),
        b"1" + b"0" * 5000,
        b"1" + b"0" * 4000,
        str(MOST_SEQ + 1).encode(),
    ],
)
def test_a_number_is_ascii_digits_and_not_huge(name: bytes, value: bytes) -> None:
    with pytest.raises(InvalidOptionError) as refused:
        parsed(b"text", SECRET.encode(), b"key", b"k", name, value)
    assert refused.value.option == name.decode()
    assert len(str(refused.value)) < 200
    check_silent(refused.value)


@laws(max_examples=60)
@given(
    fields=st.lists(
        st.sampled_from([b"text", b"id", b"key", b"end", b"seq", b"priority", b"prompt", b"1"])
        | st.binary(max_size=8)
    )
)
def test_any_fields_are_an_entry_or_refused(fields: list[bytes]) -> None:
    try:
        entry = parsed(*fields)
    except InvalidInputError:
        return
    assert StreamEntry.parse(wire(entry.fields()), MOST_CHARS) == entry


@pytest.mark.parametrize(
    ("entry", "error", "says"),
    [
        ({"text": None}, InvalidTextError, "not NoneType"),
        ({"text": SECRET.encode()}, InvalidTextError, "not bytes"),
        ({"text": [SECRET]}, InvalidTextError, "not list"),
        ({"text": SECRET * 100}, TooLargeError, "SUTRA_MAX_TEXT_CHARS"),
        ({"text": SECRET + "\ud800"}, InvalidTextError, "surrogate at character 12"),
        ({"text": SECRET, "id": "\ud800"}, InvalidTextError, "surrogate"),
        ({"text": SECRET, "id": ""}, InvalidOptionError, "id=''"),
        ({"text": SECRET, "id": 7.0}, InvalidOptionError, "id=7.0"),
        ({"text": SECRET, "key": "k" * 201}, InvalidOptionError, "1 to 200 characters"),
        ({"text": SECRET, "prompt": b"query"}, InvalidOptionError, "prompt=b'query'"),
        ({"text": SECRET, "priority": -1}, InvalidOptionError, "priority=-1"),
        ({"text": SECRET, "priority": 10}, InvalidOptionError, "0 to 9"),
        ({"text": SECRET, "priority": True}, InvalidOptionError, "priority=True"),
        ({"text": SECRET, "priority": None}, InvalidOptionError, "priority=None"),
        ({"text": SECRET, "priority": 10**5000}, InvalidOptionError, "priority="),
        ({"text": SECRET, "key": "k", "seq": -1}, InvalidOptionError, "seq=-1"),
        ({"text": SECRET, "key": "k", "seq": 1.0}, InvalidOptionError, "seq=1.0"),
        ({"text": SECRET, "key": "k", "seq": 2**53}, InvalidOptionError, "seq=9007199254740992"),
        ({"text": SECRET, "key": "k", "seq": 10**5000}, InvalidOptionError, "seq="),
        ({"text": SECRET, "end": True}, InvalidOptionError, "end=...: expected a key"),
        ({"text": SECRET, "seq": 0}, InvalidOptionError, "seq=...: expected a key"),
    ],
)
def test_what_cannot_be_embedded_is_refused(
    entry: dict[str, Any], error: type[InvalidInputError], says: str
) -> None:
    with pytest.raises(InvalidInputError) as refused:
        StreamEntry(**entry).checked(MOST_CHARS)
    assert type(refused.value) is error
    assert says in str(refused.value)
    assert len(str(refused.value)) < 250
    check_silent(refused.value)


@pytest.mark.parametrize("name", ["docs", "a", "0", "a.b-c_D9", "x" * 64])
def test_a_streams_name_is_plain(name: str) -> None:
    assert check_stream(name) == name


@pytest.mark.parametrize("name", ["", "-a", ".a", "a b", "a:b", "{a}", "a\n", "é", "x" * 65, None, b"a"])
def test_another_name_is_refused(name: Any) -> None:
    with pytest.raises(InvalidOptionError, match="64 at most") as refused:
        check_stream(name)
    assert refused.value.option == "stream"


def test_a_log_is_no_place_for_texts() -> None:
    entry = StreamEntry(SECRET, id="7")
    assert repr(entry) == "<StreamEntry 7 12 characters>"
    assert repr(StreamEntry(SECRET, key="k")) == "<StreamEntry k 12 characters>"


@pytest.mark.parametrize("name", ["id", "key"])
@pytest.mark.parametrize("number", [0, 42, -7, 2**70, np.int64(42), np.uint8(3)])
def test_a_whole_number_is_the_name_that_its_digits_are(name: str, number: Any) -> None:
    given: dict[str, Any] = {name: number}
    entry = StreamEntry("some", **given).checked(MOST_CHARS)
    assert getattr(entry, name) == str(int(number))
    assert StreamEntry.parse(wire(entry.fields()), MOST_CHARS) == entry
    assert f" {int(number)} " in repr(StreamEntry("some", **given))


@pytest.mark.parametrize("name", ["id", "key"])
@pytest.mark.parametrize("value", [True, 42.0, 10**300, HUGE, b"42", (), {}, object()])
def test_a_name_that_is_neither_a_string_nor_a_whole_number_is_refused(name: str, value: Any) -> None:
    given: dict[str, Any] = {name: value}
    with pytest.raises(InvalidOptionError, match=f"{name}=.*or a whole number"):
        StreamEntry("some", **given).checked(MOST_CHARS)
