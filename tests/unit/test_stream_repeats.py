"""A repeat is the same entry, or the same text under the same id; an id with another text is news."""

from __future__ import annotations

import numpy as np
import pytest

from sutra_tasks.streaming.client.repeats import Repeats
from sutra_tasks.streaming.responses import EmbeddedChunk, StreamingResponse, hash_of


def chunk(name: str, text: str, entry: str, *, number: int = 0, source: str = "") -> EmbeddedChunk:
    hashed = hash_of(text, None, number)
    return EmbeddedChunk(name, source or name, None, number, 0, 1, False, False, None, 1, entry, hashed)


def response(*chunks: EmbeddedChunk, space: str = "m:1") -> StreamingResponse:
    rows = np.zeros((len(chunks), 1), dtype=np.float32)
    return StreamingResponse("1-0", chunks, rows, space, "m", "d", 1.0)


def news(repeats: Repeats, *chunks: EmbeddedChunk, space: str = "m:1") -> list[str | None]:
    """Return the entries of the chunks of one response that are news, and handle it."""
    found = repeats.without(response(*chunks, space=space))
    repeats.handled()
    return [] if found is None else [one.entry for one in found.chunks]


def test_another_text_under_an_old_id_is_news_and_the_first_one_again_is_too() -> None:
    repeats = Repeats(100)
    assert news(repeats, chunk("42", "one", "1-0")) == ["1-0"]
    assert news(repeats, chunk("42", "two", "2-0")) == ["2-0"]
    assert news(repeats, chunk("42", "one", "3-0")) == ["3-0"]


def test_they_are_news_within_one_response_as_well() -> None:
    entries = [("one", "1-0"), ("two", "2-0"), ("two", "3-0"), ("one", "4-0"), ("one", "4-0")]
    assert news(Repeats(100), *(chunk("42", *each) for each in entries)) == ["1-0", "2-0", "4-0"]


def test_an_entry_that_is_delivered_again_is_a_repeat_whatever_came_since() -> None:
    repeats = Repeats(100)
    news(repeats, chunk("42", "one", "1-0"))
    news(repeats, chunk("42", "two", "2-0"))
    assert news(repeats, chunk("42", "one", "1-0")) == []


def test_an_entry_that_its_producer_sent_again_is_a_repeat() -> None:
    repeats = Repeats(100)
    news(repeats, chunk("42", "one", "1-0"))
    assert news(repeats, chunk("42", "one", "2-0")) == []
    assert news(repeats, chunk("42", "two", "3-0")) == ["3-0"]
    assert news(repeats, chunk("42", "one", "2-0")) == []  # delivered again


def test_a_text_that_another_model_embedded_is_news() -> None:
    repeats = Repeats(100)
    news(repeats, chunk("42", "one", "1-0"), space="m:1")
    assert news(repeats, chunk("42", "one", "2-0"), space="m:2") == ["2-0"]


def test_a_long_text_that_was_replaced_in_between_comes_whole() -> None:
    def long(entry: str) -> list[EmbeddedChunk]:
        return [chunk(f"42#{n}", f"part {n}", entry, number=n, source="42") for n in range(3)]

    repeats = Repeats(100)
    assert news(repeats, *long("1-0")) == ["1-0"] * 3
    assert news(repeats, *long("2-0")) == []
    assert news(repeats, chunk("42", "short", "3-0")) == ["3-0"]
    assert news(repeats, *long("4-0")) == ["4-0"] * 3


def test_what_was_given_and_not_handled_is_no_repeat_when_it_comes_again() -> None:
    repeats = Repeats(100)
    one = response(chunk("42", "one", "1-0"))
    assert repeats.without(one) is one
    assert repeats.without(one) is None
    repeats.put_back()
    assert repeats.without(one) is one


@pytest.mark.parametrize("remember", [0, 1])
def test_only_as_much_is_remembered_as_was_asked_for(remember: int) -> None:
    repeats = Repeats(remember)
    one, other = chunk("a", "one", "1-0"), chunk("b", "two", "2-0")
    assert (news(repeats, one), news(repeats, other)) == (["1-0"], ["2-0"])
    assert news(repeats, other) == ([] if remember else ["2-0"])
    assert news(repeats, one) == ["1-0"]


def test_chunks_of_an_older_release_are_told_apart_by_when_they_arrived() -> None:
    repeats = Repeats(100)
    old = EmbeddedChunk("42", "42", None, 0, 0, 1, False, False, None, 1)
    later = EmbeddedChunk("42", "42", None, 0, 0, 1, False, False, None, 2)
    assert [len(news(repeats, one)) for one in (old, old, later, later)] == [1, 0, 1, 0]
