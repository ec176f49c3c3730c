"""The output of a stream: round trips, and what this release did not write."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as laws
from hypothesis import strategies as st

from sutra_tasks.errors import CorruptResultError, InvalidTextError, UnsupportedVersionError
from sutra_tasks.streaming.responses import (
    VERSION,
    EmbeddedChunk,
    StreamingError,
    StreamingResponse,
    error_fields,
    hash_of,
    parse_output,
    readable_ids,
)

TEXTS = st.text(st.characters(codec="utf-8"), max_size=60)
NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
CHUNKS = st.builds(
    EmbeddedChunk,
    id=NAMES,
    source=NAMES,
    key=st.none() | NAMES,
    number=st.integers(0, 10**6),
    start=st.integers(0, 10**9),
    end=st.integers(0, 10**9),
    overlap_previous=st.booleans(),
    overlap_next=st.booleans(),
    flushed=st.sampled_from([None, "idle"]),
    arrived_ms=st.integers(0, 2**44),
    entry=st.none() | NAMES,
    text_hash=st.none() | NAMES,
)


def response_fields(chunks: list[EmbeddedChunk], rows: Any) -> dict[bytes, bytes]:
    return {
        b"v": str(VERSION).encode(),
        b"kind": b"response",
        b"chunks": f"[{','.join(chunk.to_json() for chunk in chunks)}]".encode(),
        b"vectors": np.asarray(rows, dtype="<f4").tobytes(),
        b"space": b"s",
        b"model": b"m",
        b"device": b"d",
        b"latency_ms": b"12.5",
    }


@laws(max_examples=50)
@given(chunk=CHUNKS)
def test_a_chunk_survives_json(chunk: EmbeddedChunk) -> None:
    assert EmbeddedChunk.from_json(json.loads(chunk.to_json())) == chunk


def test_json_leaves_out_what_is_usual() -> None:
    whole = EmbeddedChunk(
        "1-0",
        "1-0",
        None,
        0,
        0,
        5,
        overlap_previous=False,
        overlap_next=False,
        flushed=None,
        arrived_ms=1,
    )
    assert json.loads(whole.to_json()) == {"id": "1-0", "start": 0, "end": 5, "at": 1}
    assert repr(whole) == "<EmbeddedChunk 1-0 0:5>"


@laws(max_examples=60)
@given(chunks=st.lists(CHUNKS, min_size=1, max_size=5), width=st.integers(1, 6))
def test_a_response_survives_the_stream(chunks: list[EmbeddedChunk], width: int) -> None:
    rows = np.arange(len(chunks) * width, dtype=np.float32).reshape(len(chunks), width)
    found = parse_output(b"5-1", response_fields(chunks, rows))
    assert isinstance(found, StreamingResponse)
    assert found.chunks == tuple(chunks)
    assert found.chunk_ids == tuple(chunk.id for chunk in chunks)
    assert (found.entry_id, found.space, found.model, found.device) == ("5-1", "s", "m", "d")
    assert found.latency_ms == 12.5
    assert found.embeddings.dtype == np.float32
    assert found.embeddings.tolist() == rows.tolist()
    vectors = found.embeddings
    vectors *= 2  # the caller's own
    assert repr(found) == f"<StreamingResponse {len(chunks)} chunks, s>"

    wanted = [at % 2 == 1 for at in range(len(chunks))]
    some = found.only(wanted)
    assert some.chunks == tuple(chunks[1::2])
    assert some.embeddings.tolist() == (2 * rows[1::2]).tolist()
    assert (some.entry_id, some.space, some.latency_ms) == ("5-1", "s", 12.5)


@given(ids=st.lists(NAMES, max_size=5), reason=TEXTS)
def test_an_error_survives_the_stream(ids: list[str], reason: str) -> None:
    fields = [field.encode() for field in error_fields(ids, InvalidTextError(0, reason))]
    found = parse_output(b"5-1", dict(zip(fields[::2], fields[1::2], strict=True)))
    assert found == StreamingError("5-1", tuple(ids), "InvalidTextError", f"texts[0]: {reason}")


@pytest.mark.parametrize("version", [None, b"", b"0", b"2", b"\xff", b"9" * 5000])
def test_another_releases_output_is_refused(version: bytes | None) -> None:
    with pytest.raises(UnsupportedVersionError) as refused:
        parse_output(b"5-1", {} if version is None else {b"v": version})
    assert len(str(refused.value)) < 200


CHUNK = b'[{"id":"a","start":0,"end":5,"at":1}]'


@pytest.mark.parametrize(
    "broken",
    [
        *({name: None} for name in (b"kind", b"chunks", b"vectors", b"space", b"model", b"latency_ms")),
        {b"chunks": b"no JSON"},
        {b"chunks": b"\xff"},
        {b"chunks": b"7"},
        {b"chunks": b"null"},
        {b"chunks": b"[]"},
        {b"chunks": b"[[]]"},
        {b"chunks": b'["a"]'},
        {b"chunks": b"[null]"},
        {b"chunks": b'[{"id":"a"}]'},
        {b"chunks": b"[" * 100_000},
        {b"chunks": b'{"id":"a","start":0,"end":5,"at":1}'},
        {b"chunks": CHUNK[:-1] + b"," + CHUNK[1:]},  # two chunks, three numbers
        *({b"chunks": CHUNK.replace(b'"a"', one)} for one in (b"7", b"[]", b"null", b'"a","key":7')),
        *({b"chunks": CHUNK.replace(b"5", one)} for one in (b'"5"', b"[]", b"null", b"5.5")),
        {b"vectors": b""},
        {b"vectors": b"123"},
        {b"space": b"\xff"},
        {b"latency_ms": b"soon"},
        {b"kind": b"error"},
        {b"kind": b"error", b"ids": b"7", b"error": b"E", b"message": b"m"},
        {b"kind": b"error", b"ids": b"[", b"error": b"E", b"message": b"m"},
        {b"kind": b"error", b"ids": b"[]", b"error": b"E", b"message": b"\xff"},
    ],
)
def test_what_this_package_did_not_write_is_refused(broken: dict[bytes, bytes | None]) -> None:
    good = response_fields([EmbeddedChunk.from_json(json.loads(CHUNK)[0])], [[1, 2, 3]])
    assert isinstance(parse_output(b"5-1", good), StreamingResponse)
    fields = {name: value for name, value in (good | broken).items() if value is not None}
    with pytest.raises(CorruptResultError) as refused:
        parse_output(b"5-1", fields)
    assert len(str(refused.value)) < 300


def test_ids_are_read_as_far_as_they_can_be() -> None:
    good = response_fields([EmbeddedChunk.from_json(json.loads(CHUNK)[0])], [[1, 2, 3]])
    assert readable_ids(good | {b"v": b"2", b"vectors": b"1"}) == ("a",)
    assert readable_ids({b"v": b"2", b"kind": b"error", b"ids": b'["a", 7, "b"]'}) == ("a", "b")
    for chunks in (b"[", b"7", b"[[]]", b"null", b'{"id": "a"}', b"\xff", b"[" * 100_000):
        assert readable_ids({b"chunks": chunks, b"ids": chunks}) in ((), ("id",))


def test_an_error_quotes_nothing_of_what_it_could_not_read() -> None:
    with pytest.raises(CorruptResultError) as refused:
        parse_output(b"5-1", {b"v": b"1", b"kind": b"error", b"ids": b'["secret\xff"]'})
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    "other", [("b", None, 0), ("a", "query", 0), ("a", None, 1)], ids=["text", "prompt", "place"]
)
def test_the_hash_of_a_chunk_is_that_of_its_text_prompt_and_place(other: tuple[Any, ...]) -> None:
    assert hash_of("a", None, 0) == hash_of("a", None, 0)
    assert hash_of(*other) != hash_of("a", None, 0)
