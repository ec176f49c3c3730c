"""Texts as callers give them are divided into messages without loss, or refused at once."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as laws
from hypothesis import strategies as st

from sutra_tasks import (
    AsyncStreamProducer,
    InvalidInputError,
    InvalidOptionError,
    InvalidTextError,
    StreamEntry,
    StreamProducer,
    TooLargeError,
)
from sutra_tasks.client.texts import Texts, divided, iterator_of
from sutra_tasks.settings import Settings

LIMITS = Settings(max_message_bytes=20, max_text_chars=15)
STREAMS = Settings(broker_url="redis://127.0.0.1:1/0", max_text_chars=15, stream_timeout_s=0)


@laws(max_examples=80)
@given(texts=st.lists(st.text(max_size=5)), most=st.integers(1, 6), fails=st.booleans())
def test_every_text_is_in_one_message_in_order_and_no_message_is_too_large(
    texts: list[str], most: int, fails: bool
) -> None:
    def given_texts() -> Iterator[str]:
        yield from texts
        if fails:
            raise OSError

    *messages, last = [*divided(given_texts(), most, LIMITS), None]
    if fails:
        last = messages.pop()
        assert isinstance(last, OSError)
    read: list[str] = []
    for one in messages:
        assert isinstance(one, Texts)
        assert one.start == len(read)
        assert 1 <= len(one.texts) <= most
        assert sum(len(text.encode()) for text in one.texts) <= LIMITS.max_message_bytes
        read += one.texts
    assert read == texts


def test_a_full_message_is_given_before_the_next_text_is_read() -> None:
    read = []

    def slow() -> Iterator[str]:
        for text in "abcd":
            read.append(text)
            yield text

    assert next(divided(slow(), 2, LIMITS)) == Texts(0, ["a", "b"])
    assert read == ["a", "b"]


ONE_TEXT = ["hello", b"hello", bytearray(b"a"), memoryview(b"a")]
NO_TEXTS = [None, 5, {"text": "a"}, object(), StreamEntry("a")]


@pytest.mark.parametrize("entries", [*ONE_TEXT, *NO_TEXTS])
def test_a_stream_takes_no_single_text_for_many(entries: Any) -> None:
    with pytest.raises(InvalidInputError, match="send_many"):
        iterator_of(entries, "send_many()")
    with StreamProducer("s", options=STREAMS) as producer:
        with pytest.raises(InvalidInputError, match=r"send_many\(\)"):
            producer.send_many(entries)
        with pytest.raises(InvalidInputError, match=r"offer\(\)"):
            next(producer.offer(entries))


async def _send_async(entries: Any) -> None:
    async with AsyncStreamProducer("s", options=STREAMS) as producer:
        await producer.send_many(entries)


async def _texts(*texts: Any) -> AsyncIterator[Any]:
    for text in texts:
        yield text


@pytest.mark.parametrize("entries", ["hello", 5, {"text": "a"}])
def test_an_async_producer_refuses_the_same(entries: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"send_many\(\)"):
        asyncio.run(_send_async(entries))


@pytest.mark.parametrize(
    ("bad", "told", "match"),
    [
        (None, InvalidTextError, r"texts\[0\]"),
        ("x" * 16, TooLargeError, r"characters in texts\[0\]"),
        (StreamEntry("a", priority=11), InvalidOptionError, r"priority of texts\[0\]"),
    ],
)
def test_an_invalid_entry_is_told_by_its_place(bad: Any, told: type[Exception], match: str) -> None:
    with StreamProducer("s", options=STREAMS) as producer, pytest.raises(told, match=match):
        producer.send_many([bad])
    with pytest.raises(told, match=match):
        asyncio.run(_send_async(_texts(bad)))
