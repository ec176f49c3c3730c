"""From a call's texts to rows: whole, truncated, in chunks, and in windows of late chunking."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as laws
from hypothesis import strategies as st

from sutra_tasks.batching.batcher import Batcher
from sutra_tasks.batching.jobs import JobContext, Unwanted
from sutra_tasks.batching.next_batch import Limits
from sutra_tasks.batching.service import EmbeddingService
from sutra_tasks.chunking.answer import TextLayout
from sutra_tasks.chunking.chunked_call import CallChunker, ChunkedCall
from sutra_tasks.chunking.chunker import MOST_OVERLAP, Chunker
from sutra_tasks.chunking.late_windows import chunks_of_windows
from sutra_tasks.chunking.weights import chunk_weights
from sutra_tasks.client.call import Call
from sutra_tasks.engines.encoder import ModelInfo, TokenizedText
from sutra_tasks.engines.offsets import Offsets
from sutra_tasks.engines.simulated_engine import SPECIAL_TOKENS, WINDOW, SimulatedEncoder, vectors_of
from sutra_tasks.errors import EncodingError, ModelError
from sutra_tasks.settings import METHODS, Settings
from sutra_tasks.vectors import Embeddings, Floats

WIDTH = 8


class Prompted(SimulatedEncoder):
    """A simulated engine with prompts of so many tokens, and a window of its own."""

    def __init__(self, prompts: dict[str, int] | None = None, *, window: int = WINDOW) -> None:
        super().__init__(width=WIDTH)
        prompted = {name: "p " * tokens for name, tokens in (prompts or {}).items()}
        self.info = ModelInfo("prompted", f"prompted:{WIDTH}", WIDTH, window, prompted)
        self._tokens = prompts or {}

    def tokenize(self, texts: Sequence[str], prompt: str | None) -> list[TokenizedText]:
        more = self._tokens[prompt] if prompt else 0
        return [TokenizedText(one.tokens + more, one.content) for one in super().tokenize(texts, None)]

    def windows(
        self, text: TokenizedText, offsets: Offsets, spans: Sequence[tuple[int, int]]
    ) -> list[TokenizedText]:
        more = text.tokens - len(offsets) - SPECIAL_TOKENS
        return [
            TokenizedText(one.tokens + more, one.content)
            for one in super().windows(text, offsets, spans)
        ]


class Pooling(Prompted):
    """An engine for late chunking: a chunk's vector depends on its window and its place there."""

    bad = ""

    def __init__(self, prompts: dict[str, int] | None = None, *, window: int = WINDOW) -> None:
        super().__init__(prompts, window=window)
        self.info = replace(self.info, pools_mean=True)

    def pool(self, text: TokenizedText, spans: Sequence[tuple[int, int]]) -> Floats:
        if self.bad and self.bad in text.content:
            raise ValueError(text.content)
        return vectors_of([f"{text.content} {start}:{stop}" for start, stop in spans], WIDTH)


def words(count: int, name: str = "w") -> str:
    return " ".join(f"{name}{n}" for n in range(count))


def prose(sentences: int) -> str:
    return " ".join(f"Sentence number {n} says very little, as it is made up." for n in range(sentences))


def chunked(
    texts: str | list[str],
    encoder: SimulatedEncoder | None = None,
    options: dict[str, Any] | None = None,
    **asked: Any,
) -> ChunkedCall:
    chunker = CallChunker(encoder or Prompted(), Settings(**(options or {})))
    return chunker.chunk(Call.of([texts], asked, Settings()))


def contents(found: ChunkedCall) -> list[str]:
    return [row.content for row in found.rows]


# Whole, or in chunks.


@pytest.mark.parametrize("threshold", [None, 5, 100, WINDOW])
def test_a_text_of_the_threshold_is_whole_and_one_token_more_is_not(threshold: int | None) -> None:
    limit = threshold or WINDOW
    short, long = words(limit - SPECIAL_TOKENS), words(limit + 1 - SPECIAL_TOKENS)
    options = {"sequence_threshold": threshold, "block_size": threshold, "overlap_tokens": 1}
    found = chunked([short, long], options=options)
    assert found.layout.texts[0] == TextLayout(limit, ((0, len(short)),), (1.0,))
    assert found.rows[0].content == short
    assert found.layout.texts[1].tokens == limit + 1
    assert len(found.layout.texts[1].spans) == 2
    assert not found.late_windows


def test_threshold_and_block_are_usually_512_or_the_window() -> None:
    for window, usual in ((100, 100), (512, 512), (8192, 512)):
        found = chunked([words(usual - 2), words(usual - 1)], Prompted(window=window))
        assert [len(text.spans) for text in found.layout.texts] == [1, 2]
        assert max(row.tokens for row in found.rows) <= usual


def test_a_static_model_takes_texts_of_any_length_whole_unless_a_threshold_is_set() -> None:
    encoder = Pooling(window=2**23)
    encoder.info = replace(encoder.info, is_static=True)
    text = words(3_000)
    assert len(chunked(text, encoder).rows) == 1
    assert len(chunked(text, encoder, {"sequence_threshold": 1_000}).rows) > 1
    assert len(chunked(text, encoder, {"chunking": "late"}).rows) == 1


def test_a_larger_threshold_keeps_more_texts_whole_and_chunks_others_as_before() -> None:
    options = {"sequence_threshold": 2000, "block_size": 128}
    found = chunked([words(1998), words(1999)], Prompted(window=4096), options)
    assert [len(text.spans) > 1 for text in found.layout.texts] == [False, True]
    assert max(row.tokens for row in found.rows[1:]) <= 128


def test_a_text_over_the_threshold_that_fits_a_block_is_whole() -> None:
    text = "  " + words(98) + " "
    found = chunked(text, options={"sequence_threshold": 10, "block_size": 100})
    assert found.layout.texts == (TextLayout(100, ((0, len(text)),), (1.0,)),)
    assert contents(found) == [text]
    assert found.layout.chunk_count == 0


@pytest.mark.parametrize("text", ["", " ", "\n\t"])
def test_nothing_beside_a_prompt_over_the_threshold_is_one_row(text: str) -> None:
    options = {"sequence_threshold": 5, "block_size": 100}
    found = chunked([text, "a"], Prompted({"query": 20}), options, prompt="query")
    assert [len(one.spans) for one in found.layout.texts] == [1, 1]
    assert contents(found) == [text, "a"]
    assert found.layout.texts[0].tokens == 22


def test_no_text_has_no_row() -> None:
    found = chunked([])
    assert (found.layout.texts, found.rows, found.late_windows, found.row_numbers()) == ((), [], [], [])


@laws(max_examples=60, deadline=None)
@given(
    sentences=st.lists(st.integers(0, 30), min_size=1, max_size=4),
    block=st.integers(10, 100),
    overlap=st.integers(0, 6),
    prompt=st.sampled_from([None, "query"]),
)
def test_chunks_are_slices_of_their_text_and_fit_their_block(
    sentences: list[int], block: int, overlap: int, prompt: str | None
) -> None:
    texts = [prose(count) for count in sentences]
    options = {"sequence_threshold": 20, "block_size": block, "overlap_tokens": min(overlap, block // 4)}
    found = chunked(texts, Prompted({"query": 2}), options, prompt=prompt)
    assert len(found.rows) == found.layout.row_count
    rows = iter(found.rows)
    for text, one in zip(texts, found.layout.texts, strict=True):
        for start, end in one.spans:
            row = next(rows)
            assert row.content == text[start:end]
            assert row.tokens <= max(block, 20)
        assert one.spans[0][0] == 0
        assert one.spans[-1][1] == len(text)
        assert sum(one.weights) == pytest.approx(1)
        assert len(one.weights) == len(one.spans)
        assert not one.truncated


def test_long_and_short_texts_are_rows_in_their_order() -> None:
    texts = ["a", words(30, "x"), "b", "c", words(25, "y")]
    found = chunked(texts, options={"sequence_threshold": 20, "block_size": 14, "overlap_tokens": 2})
    assert [len(one.spans) for one in found.layout.texts] == [1, 3, 1, 1, 3]
    assert [row[0] for row in contents(found)] == list("axxxbcyyy")
    assert [found.position_of(row) for row in range(9)] == [0, 1, 1, 1, 2, 3, 4, 4, 4]
    assert found.row_numbers() == list(range(9))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed_exact", [False, True])
def test_weights_are_of_the_method_that_was_asked(method: str, seed_exact: bool) -> None:
    shape = {"sequence_threshold": 20, "block_size": 14, "overlap_tokens": 5}
    other = "positional" if method == "mean" else "mean"
    for of_the_fleet, of_the_call in ((method, None), (other, method)):
        options = {**shape, "aggregation_method": of_the_fleet, "seed_exact": seed_exact}
        found = chunked(words(30), options=options, aggregation_method=of_the_call)
        spans = Chunker(12, 5).spans(
            words(30), Prompted().offsets(Prompted().tokenize([words(30)], None)[0])
        )
        expected = chunk_weights(spans, method, seed_exact=seed_exact)
        assert found.layout.method == method
        assert found.layout.texts[0].weights == tuple(expected)


# Cut at the window.


def test_truncate_keeps_what_fits_the_window_and_says_so() -> None:
    texts = [words(98), words(99), "short", words(60)]
    found = chunked(texts, Prompted(window=100), {"sequence_threshold": 50}, truncate=True)
    assert [one.truncated for one in found.layout.texts] == [False, True, False, False]
    assert [one.tokens for one in found.layout.texts] == [100, 100, 3, 62]
    assert [len(one.spans) for one in found.layout.texts] == [1, 1, 1, 1]
    assert contents(found) == [words(98), words(98), "short", words(60)]
    assert found.layout.texts[1].spans == ((0, len(words(98))),)
    assert found.layout.chunk_count == 0


def test_a_prompt_takes_its_room_of_the_window() -> None:
    found = chunked(words(99), Prompted({"query": 10}, window=100), prompt="query", truncate=True)
    assert contents(found) == [words(88)]
    assert found.rows[0].tokens == 100


# Settings that do not fit the model.


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sequence_threshold": 513}, "SUTRA_SEQUENCE_THRESHOLD=513 is over its window of 512"),
        ({"block_size": 513}, "SUTRA_BLOCK_SIZE=513 is over its window of 512"),
        ({"block_size": 102, "overlap_tokens": 86}, "85 % of a block of 100"),
        ({"block_size": 2}, "a block of 0 tokens"),
        ({"chunking": "late", "block_size": 436}, "SUTRA_CHUNKING=late needs blocks smaller than 85 %"),
        ({"chunking": "late"}, "SUTRA_CHUNKING=late needs blocks smaller than 85 %"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        CallChunker(Pooling(), Settings(**options))


@pytest.mark.parametrize(
    "options",
    [
        {"sequence_threshold": 512, "block_size": 512},
        {"block_size": 102, "overlap_tokens": 85},
        {"block_size": 3, "overlap_tokens": 0},
        {"chunking": "late", "block_size": 435},
    ],
)
def test_settings_that_just_fit_are_taken(options: dict[str, Any]) -> None:
    chunker = CallChunker(Pooling(), Settings(**options))
    assert chunker.chunk(Call.of([words(2000)], {}, Settings())).layout.chunk_count


def test_a_prompt_that_leaves_no_room_in_a_block_is_refused_by_its_name() -> None:
    for tokens in (60, 98, 500):
        with pytest.raises(ModelError, match=r"under its prompt 'query'.*SUTRA_BLOCK_SIZE"):
            CallChunker(Prompted({"short": 1, "query": tokens}), Settings(block_size=100))
    CallChunker(Prompted({"short": 1, "query": 39}), Settings(block_size=100))


def test_a_model_that_cannot_pool_is_refused_for_late_chunking() -> None:
    with pytest.raises(ModelError, match="SUTRA_CHUNKING=late"):
        CallChunker(SimulatedEncoder(), Settings(chunking="late", block_size=100))


# Late chunking: windows, and which of them gives a chunk.


@st.composite
def chunks_and_windows(draw: st.DrawFn) -> tuple[list[tuple[int, int]], list[tuple[int, int]], int]:
    """Draw chunks and windows of a text, from settings that are valid."""
    specials = draw(st.integers(0, 6))
    window = draw(st.integers(8 + 2 * specials, 80))
    block = draw(st.integers(specials + 1, int(MOST_OVERLAP * window)))
    room = block - specials
    text = draw(st.text("ab. ", max_size=300))
    offsets = Offsets(np.arange(len(text)), np.arange(len(text)) + 1)
    chunks = Chunker(room, draw(st.integers(0, int(MOST_OVERLAP * room)))).spans(text, offsets)
    seen = window - specials
    windows = Chunker(seen, min(block, int(MOST_OVERLAP * seen))).spans(text, offsets)
    return chunks, windows, len(text)


@laws(max_examples=80, deadline=None)
@given(drawn=chunks_and_windows())
def test_each_chunk_is_whole_in_the_one_window_that_gives_it(
    drawn: tuple[list[tuple[int, int]], list[tuple[int, int]], int],
) -> None:
    chunks, windows, total = drawn
    if not total:
        return
    found = chunks_of_windows(chunks, windows)
    assert len(found) == len(windows)
    assert list(chain.from_iterable(found)) == list(range(len(chunks)))
    for (first, end), mine in zip(windows, found, strict=True):
        for start, stop in chunks[mine.start : mine.stop]:
            assert first <= start < stop <= end


@laws(max_examples=60, deadline=None)
@given(drawn=chunks_and_windows())
def test_no_other_window_shows_a_chunk_more_of_its_surroundings(
    drawn: tuple[list[tuple[int, int]], list[tuple[int, int]], int],
) -> None:
    chunks, windows, total = drawn
    if not total:
        return

    def around(chunk: tuple[int, int], window: tuple[int, int]) -> int:
        before = chunk[0] - window[0] if window[0] else total
        after = window[1] - chunk[1] if window[1] < total else total
        whole = window[0] <= chunk[0] and chunk[1] <= window[1]
        return min(before, after) if whole else -1

    for window, mine in zip(windows, chunks_of_windows(chunks, windows), strict=True):
        for chunk in chunks[mine.start : mine.stop]:
            assert around(chunk, window) == max(around(chunk, one) for one in windows)


LATE: dict[str, Any] = {
    "chunking": "late",
    "sequence_threshold": 50,
    "block_size": 20,
    "overlap_tokens": 4,
}


def test_late_chunks_are_those_of_plain_chunking_seen_in_windows() -> None:
    texts = ["short", prose(30), "also short", words(60)]
    late = chunked(texts, Pooling(window=100), LATE)
    plain = chunked(texts, Prompted(window=100), LATE | {"chunking": "plain"})
    assert late.layout == plain.layout
    assert contents(late) == ["short", "also short"]
    spans = list(chain.from_iterable(text.spans for text in late.layout.texts))
    given_by = [row for one in late.late_windows for row in one.row_numbers]
    assert sorted(given_by + late.row_numbers()) == list(range(late.layout.row_count))
    for one in late.late_windows:
        assert one.text.tokens <= 100
        tokens = one.text.content.split()
        text = texts[late.layout.positions[one.first_row]]
        for row, (start, stop) in enumerate(one.spans, one.first_row):
            assert " ".join(tokens[start:stop]) == text[slice(*spans[row])]
    assert [late.position_of(row) for row in range(2)] == [0, 2]


# And its answer.


@pytest.fixture
def batcher() -> Iterator[Batcher]:
    batcher = Batcher(Limits(max_tokens=4096, max_texts=8, max_wait_s=0))
    batcher.start()
    yield batcher
    batcher.close(10)


@pytest.fixture
def late(batcher: Batcher) -> EmbeddingService:
    return EmbeddingService(Pooling(window=100), batcher, "gpu0", Settings(**LATE))


def asked(service: EmbeddingService, texts: str | list[str], **options: Any) -> Any:
    call = Call.of([texts], {"details": True, "chunk_vectors": True, **options}, Settings())
    return service.prepare(call)


def test_rows_of_late_windows_and_of_batches_are_in_order(late: EmbeddingService) -> None:
    texts = ["short", prose(30), "also short", words(60)]
    prepared = asked(late, texts)
    assert not prepared.can_spread
    got = late.answer(prepared)
    assert isinstance(got, Embeddings)
    assert got.chunk_vectors is not None
    for one in prepared.chunked.late_windows:
        expected = Pooling(window=100).pool(one.text, one.spans)
        assert np.allclose(got.chunk_vectors[one.row_numbers], expected, atol=1e-6)
    numbers = prepared.chunked.row_numbers()
    assert np.allclose(got.chunk_vectors[numbers], vectors_of(["short", "also short"], WIDTH), atol=1e-6)
    assert np.allclose(got.vectors[[0, 2]], vectors_of(["short", "also short"], WIDTH), atol=1e-6)


def test_a_list_without_long_texts_is_not_kept_from_spreading(late: EmbeddingService) -> None:
    assert asked(late, ["a", "b"]).can_spread


def test_a_late_window_that_fails_names_its_text(
    late: EmbeddingService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pooling, "bad", "w59")
    with pytest.raises(EncodingError) as failed:
        late.answer(asked(late, ["short", prose(30), words(60)]))
    assert (failed.value.position, failed.value.reason) == (2, "ValueError")


def test_late_windows_end_where_the_call_is_given_up(late: EmbeddingService) -> None:
    left = [True, True]
    with pytest.raises(Unwanted):
        late.answer(asked(late, prose(60)), JobContext(lambda: bool(left) and left.pop()))
