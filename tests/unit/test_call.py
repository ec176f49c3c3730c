"""A call of ``embed`` is checked where it is made, and its header tells the router enough."""

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as laws
from hypothesis import strategies as st

from sutra_tasks.client.call import VERSION, Call, Demand, demand_of
from sutra_tasks.errors import (
    InvalidInputError,
    InvalidOptionError,
    InvalidTextError,
    TooLargeError,
    UnsupportedVersionError,
)
from sutra_tasks.settings import Settings

LIMITS = Settings(max_texts=4, max_text_chars=10, max_message_bytes=24)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)


def call(*args: Any, **kwargs: Any) -> Call:
    return Call.of(args, kwargs, LIMITS)


@pytest.mark.parametrize(
    ("texts", "expected", "single", "size"),
    [
        ("one", ("one",), True, 3),
        ("", ("",), True, 0),
        ("a\0b", ("a\0b",), True, 3),
        ("🙂é", ("🙂é",), True, 6),
        ([], (), False, 0),
        ([""], ("",), False, 0),
        (["a", "b"], ("a", "b"), False, 2),
        (("a", "a"), ("a", "a"), False, 2),
        (["x" * 10], ("x" * 10,), False, 10),
        (["a"] * 4, ("a",) * 4, False, 4),
        (np.array(["a", "b"]), ("a", "b"), False, 2),
        (np.array(["a", "b"], dtype=object), ("a", "b"), False, 2),
        (np.str_("a"), ("a",), True, 1),
    ],
)
def test_text_and_lists_of_text_are_taken_as_they_are(
    texts: Any, expected: tuple[str, ...], single: bool, size: int
) -> None:
    for made in (call(texts), call(texts=texts)):
        assert (made.texts, made.single, made.bytes) == (expected, single, size)


@pytest.mark.parametrize(
    ("texts", "position", "said"),
    [
        (b"bytes", 0, "bytes"),
        (None, 0, "None"),
        ({"a": 1}, 0, "dict"),
        ({"a"}, 0, "set"),
        ((t for t in "ab"), 0, "generator"),
        (1.5, 0, "float"),
        (["a", None], 1, "None"),
        (["a", "b", b"c"], 2, "bytes"),
        ([["a"]], 0, "list"),
        (np.array([["a"]]), 0, "list"),
        (np.array([1.5]), 0, "float"),
        ("ab\ud800", 0, "character 2"),
        (["a", "\udfff"], 1, "character 0"),
    ],
)
def test_what_is_not_text_is_refused_by_position(texts: Any, position: int, said: str) -> None:
    with pytest.raises(InvalidTextError, match=said) as refused:
        call(texts)
    assert refused.value.position == position


@pytest.mark.parametrize(
    ("texts", "size", "limit", "setting"),
    [
        (["a"] * 5, 5, 4, "SUTRA_MAX_TEXTS"),
        ("x" * 11, 11, 10, "SUTRA_MAX_TEXT_CHARS"),
        (["é" * 7, "é" * 6], 26, 24, "SUTRA_MAX_MESSAGE_BYTES"),
    ],
)
def test_what_is_too_large_names_the_setting_that_allows_it(
    texts: Any, size: int, limit: int, setting: str
) -> None:
    with pytest.raises(TooLargeError) as refused:
        call(texts)
    assert (refused.value.size, refused.value.limit) == (size, limit)
    assert refused.value.setting == setting


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((), {}), (("a", "b"), {}), (("a",), {"texts": "b"}), ((), {"prompt": "q"})],
)
def test_texts_are_given_exactly_once(args: tuple[str, ...], kwargs: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match="embed"):
        call(*args, **kwargs)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("dimension", 8),
        ("text", "a"),
        ("dimensions", 0),
        ("dimensions", -1),
        ("dimensions", True),
        ("dimensions", 8.0),
        ("dimensions", "8"),
        ("prompt", 1),
        ("prompt", b"query"),
        ("normalize", 1),
        ("normalize", None),
        ("normalize", "yes"),
        ("details", 0),
    ],
)
def test_an_option_that_cannot_be_is_refused_by_name(option: str, value: object) -> None:
    with pytest.raises(InvalidOptionError) as refused:
        call("a", **{option: value})
    assert refused.value.option == option


def test_options_arrive_and_default() -> None:
    made = call("a", prompt="query", dimensions=8, normalize=False, details=True)
    assert (made.prompt, made.dimensions, made.normalize, made.details) == ("query", 8, False, True)
    made = call("a")
    assert (made.prompt, made.dimensions, made.normalize, made.details) == (None, None, True, False)


def test_checking_leaves_the_arguments_alone() -> None:
    args, kwargs = ["a"], {"dimensions": 8}
    Call.of(args, kwargs, LIMITS)
    assert (args, kwargs) == (["a"], {"dimensions": 8})


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        (("secret", "more"), {}),
        (("secret",), {"texts": "secret"}),
        ((["a", "secret\ud800"],), {}),
        ((["secret" * 3],), {}),
    ],
)
def test_no_refusal_holds_a_text(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    with pytest.raises(InvalidInputError) as refused:
        Call.of(args, kwargs, LIMITS)
    assert "secret" not in repr(refused.value)


def test_repr_holds_no_text() -> None:
    assert repr(call(["secret", "é"])) == "<Call 2 texts, 8 bytes>"


@laws(max_examples=60, deadline=None)
@given(texts=st.lists(st.text(max_size=20), max_size=20))
def test_bytes_are_those_of_utf8(texts: list[str]) -> None:
    made = Call.of([texts], {}, Settings())
    assert made.texts == tuple(texts)
    assert made.bytes == len("".join(texts).encode())


@laws(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text(max_size=5), max_size=5),
    sent_at=st.floats(0, 4e9),
    strategy=st.none() | st.text(max_size=10),
)
def test_the_header_tells_the_router_what_the_call_is(
    texts: list[str], sent_at: float, strategy: str | None
) -> None:
    made = Call.of([texts], {}, Settings())
    travelled = json.loads(json.dumps(made.header(sent_at=sent_at, strategy=strategy)))
    assert demand_of(travelled, 0) == Demand(len(texts), made.bytes, sent_at, strategy)


def test_a_message_of_another_client_counts_by_its_body() -> None:
    assert demand_of(None, 70) == Demand(texts=1, bytes=70, sent_at=None, strategy=None)


@pytest.mark.parametrize(
    "header", [{"v": 2}, {"v": "1"}, {"v": None}, {"v": "x" * 100}, {}, [], "v1", 1]
)
def test_a_header_of_another_version_is_refused(header: Any) -> None:
    with pytest.raises(UnsupportedVersionError, match="message has version") as refused:
        demand_of(header, 0)
    assert len(refused.value.version) <= 20


@laws(max_examples=50, deadline=None)
@given(header=JSON)
def test_no_header_breaks_the_router(header: Any) -> None:
    with suppress(UnsupportedVersionError):
        demand_of(header, 0)


@laws(max_examples=50, deadline=None)
@given(texts=JSON, size=JSON, sent_at=JSON, strategy=JSON)
def test_a_field_that_makes_no_sense_counts_as_missing(
    texts: Any, size: Any, sent_at: Any, strategy: Any
) -> None:
    demand = demand_of(
        {"v": VERSION, "texts": texts, "bytes": size, "sent_at": sent_at, "strategy": strategy}, 7
    )
    limits = Settings()
    assert demand.texts == (min(texts, limits.max_texts) if type(texts) is int and texts >= 0 else 1)
    assert demand.bytes == (
        min(size, limits.max_message_bytes) if type(size) is int and size >= 0 else 7
    )
    assert demand.sent_at is None or isinstance(demand.sent_at, int | float)
    assert demand.strategy is None or isinstance(demand.strategy, str)


def test_what_a_message_claims_beyond_the_limits_counts_as_the_limits() -> None:
    header = {"v": VERSION, "texts": 10**30, "bytes": 10**30}
    limits = Settings()
    assert demand_of(header, 7) == Demand(limits.max_texts, limits.max_message_bytes, None, None)
