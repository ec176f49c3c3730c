"""The layout of a call's rows as JSON, and the answer that it makes of their vectors."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as laws
from hypothesis import strategies as st

from sutra_tasks.chunking.answer import AggregationError, AnswerLayout, TextLayout, answer
from sutra_tasks.client.call import Call
from sutra_tasks.errors import CorruptMessageError, UnsupportedVersionError
from sutra_tasks.settings import METHODS
from sutra_tasks.vectors import Embeddings, Floats, Vectors, finish

WIDTH = 8
SPACE, MODEL = "model-1:8", "model"
FACTS: dict[str, Any] = {
    "model": MODEL,
    "space": SPACE,
    "device": "gpu0,gpu1",
    "queue_s": 0.5,
    "compute_s": 0.25,
}


def text_of(chunks: int, *, seed: int = 0, truncated: bool = False) -> TextLayout:
    """Return a text of so many chunks, of any weights."""
    weights = np.random.default_rng(seed).uniform(0.1, 1, chunks)
    return TextLayout(
        tokens=10 * chunks,
        spans=tuple((7 * n, 7 * n + 9) for n in range(chunks)),
        weights=tuple((weights / weights.sum()).tolist()),
        truncated=truncated,
    )


def layout_of(*chunks: int, method: str = "mean") -> AnswerLayout:
    return AnswerLayout(tuple(text_of(count, seed=n) for n, count in enumerate(chunks)), method)


def call_of(*, single: bool = False, **options: object) -> Call:
    return Call(texts=(), single=single, bytes=0, **options)  # type: ignore[arg-type]


def rows_of(count: int, seed: int = 0) -> Floats:
    """Return rows of many lengths."""
    draw = np.random.default_rng(seed)
    rows = draw.normal(size=(count, WIDTH)) * draw.uniform(0.1, 9, size=(count, 1))
    return rows.astype(np.float32)


TEXTS = st.builds(
    text_of, st.integers(1, 6) | st.just(1), seed=st.integers(0, 2**32), truncated=st.booleans()
)
LAYOUTS = st.builds(AnswerLayout, st.lists(TEXTS, max_size=6).map(tuple), st.sampled_from(METHODS))
CALLS = st.builds(
    call_of,
    dimensions=st.none() | st.integers(1, WIDTH),
    normalize=st.booleans(),
    details=st.just(True),
    chunk_vectors=st.booleans(),
)


# The layout.


@laws(max_examples=50, deadline=None)
@given(layout=LAYOUTS)
def test_a_layout_is_the_same_behind_its_json(layout: AnswerLayout) -> None:
    assert AnswerLayout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


@laws(max_examples=50, deadline=None)
@given(layout=LAYOUTS)
def test_each_row_has_the_position_of_its_text(layout: AnswerLayout) -> None:
    chunks = [len(text.spans) for text in layout.texts]
    assert layout.row_count == len(layout.positions) == sum(chunks)
    assert layout.positions == sorted(layout.positions)
    assert [layout.positions.count(n) for n in range(len(chunks))] == chunks


def test_only_texts_of_several_chunks_count_as_chunked() -> None:
    assert layout_of(1, 3, 1, 2).chunk_count == 5
    assert layout_of(1, 1).chunk_count == layout_of().chunk_count == 0


def test_a_layout_of_another_version_is_refused() -> None:
    with pytest.raises(UnsupportedVersionError, match="plan has version 2"):
        AnswerLayout.from_json(layout_of(2).to_json() | {"v": 2})


@pytest.mark.parametrize(
    "broken",
    [
        {"texts": None},
        {"texts": [1]},
        {"texts": [[10, [[0, 9]], [1.0]]]},
        {"texts": [[10, [[0, 9, 9]], [1.0], False]]},
        {"texts": [[10, [[0, 9]], None, False]]},
    ],
)
def test_anything_but_a_layout_is_refused(broken: dict[str, object]) -> None:
    with pytest.raises(CorruptMessageError):
        AnswerLayout.from_json(layout_of(2).to_json() | broken)


@pytest.mark.parametrize("missing", ["texts", "method"])
def test_a_layout_without_a_fact_is_refused(missing: str) -> None:
    stored = layout_of(2).to_json()
    del stored[missing]
    with pytest.raises(CorruptMessageError):
        AnswerLayout.from_json(stored)


# The answer.


def reference(layout: AnswerLayout, rows: Floats, call: Call) -> np.ndarray:
    """Compute the vectors in float64, text by text."""
    cut = rows.astype(np.float64)[:, : call.dimensions]
    found, start = [], 0
    for text in layout.texts:
        mine = cut[start : start + len(text.spans)]
        start += len(text.spans)
        if len(mine) > 1:
            unit = mine / np.sqrt((mine**2).sum(axis=1))[:, None]
            one = (
                unit.max(axis=0)
                if layout.method == "max"
                else sum(w * row for w, row in zip(text.weights, unit, strict=True))
            )
        else:
            one = mine[0]
        found.append(one / np.sqrt(one @ one) if call.normalize else one)
    return np.array(found).reshape(len(layout.texts), cut.shape[1])


@laws(max_examples=100, deadline=None)
@given(layout=LAYOUTS, call=CALLS, seed=st.integers(0, 2**32))
def test_an_answer_is_what_plain_arithmetic_gives(layout: AnswerLayout, call: Call, seed: int) -> None:
    rows = rows_of(layout.row_count, seed)
    before = rows.copy()
    expected = reference(layout, rows, call)
    got = answer(call, layout, rows, **FACTS)
    assert isinstance(got, Embeddings)
    assert (rows == before).all()
    assert got.vectors.shape == expected.shape
    assert isinstance(got.vectors, Vectors)
    assert np.allclose(got.vectors, expected, atol=2e-5)
    assert got.tokens == tuple(text.tokens for text in layout.texts)
    assert got.chunks == tuple(len(text.spans) for text in layout.texts)
    assert got.spans == tuple(text.spans for text in layout.texts)
    assert got.weights == tuple(text.weights for text in layout.texts)
    assert got.truncated == tuple(text.truncated for text in layout.texts)
    assert got.space == f"model-1:{call.dimensions or WIDTH}"
    assert (got.model, got.device, got.queue_s, got.compute_s) == (MODEL, "gpu0,gpu1", 0.5, 0.25)
    if call.chunk_vectors:
        cut = rows[:, : call.dimensions]
        if call.normalize:
            cut = cut / np.linalg.norm(cut, axis=1, keepdims=True)
        assert got.chunk_vectors is not None
        assert np.allclose(got.chunk_vectors, cut, atol=1e-6)
    else:
        assert got.chunk_vectors is None


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dimensions", [None, 3])
@pytest.mark.parametrize("normalize", [False, True])
def test_without_details_an_answer_is_its_vectors(
    method: str, dimensions: int | None, normalize: bool
) -> None:
    layout, rows = layout_of(1, 4, 1, 2, method=method), rows_of(8)
    call = call_of(dimensions=dimensions, normalize=normalize)
    got = answer(call, layout, rows, **FACTS)
    assert isinstance(got, Vectors)
    assert np.allclose(got, reference(layout, rows, call), atol=2e-5)


@pytest.mark.parametrize("details", [False, True])
@pytest.mark.parametrize("chunks", [1, 3])
def test_a_single_text_gives_one_vector(details: bool, chunks: int) -> None:
    rows = rows_of(chunks)
    got = answer(call_of(single=True, details=details), layout_of(chunks), rows, **FACTS)
    vectors = got.vectors if isinstance(got, Embeddings) else got
    assert vectors.shape == (WIDTH,)
    assert np.allclose(vectors, reference(layout_of(chunks), rows, call_of())[0], atol=2e-5)


@laws(max_examples=50, deadline=None)
@given(
    texts=st.integers(0, 5),
    dimensions=st.none() | st.integers(1, WIDTH),
    normalize=st.booleans(),
    method=st.sampled_from(METHODS),
)
def test_texts_that_are_not_chunked_are_finished_and_no_more(
    texts: int, dimensions: int | None, normalize: bool, method: str
) -> None:
    rows = rows_of(texts)
    rows[:1] = 0  # nor is a row of zeros refused
    got = answer(
        call_of(dimensions=dimensions, normalize=normalize),
        layout_of(*[1] * texts, method=method),
        rows,
        **FACTS,
    )
    assert np.array_equal(np.asarray(got), finish(rows, dimensions=dimensions, normalize=normalize))


@pytest.mark.parametrize("neighbours", [(), (1, 3)])
def test_short_texts_beside_long_ones_are_bit_for_bit_what_they_are_alone(
    neighbours: tuple[int, ...],
) -> None:
    layout = layout_of(1, *neighbours, 1)
    rows = rows_of(layout.row_count)
    got = np.asarray(answer(call_of(), layout, rows, **FACTS))
    alone = finish(rows[[0, -1]], dimensions=None, normalize=True)
    assert np.array_equal(got[[0, -1]], alone)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ([[1, 0], [-1, 0]], "cancel out"),
        ([[0, 0], [1, 0]], "zero"),
        ([[np.nan, 0], [1, 0]], "not finite"),
        ([[np.inf, 0], [1, 0]], "not finite"),
    ],
)
def test_chunks_without_a_direction_are_refused_with_the_text_they_are_of(
    bad: list[list[float]], reason: str
) -> None:
    rows = np.zeros((5, WIDTH), dtype=np.float32)
    rows[:, 2] = 1
    rows[3:] = 0
    rows[3:, :2] = bad
    halves = TextLayout(20, ((0, 9), (7, 16)), (0.5, 0.5))
    layout = AnswerLayout((text_of(1), halves, halves), "mean")
    with pytest.raises(AggregationError, match=reason) as refused:
        answer(call_of(), layout, rows, **FACTS)
    assert refused.value.position == 2


def test_chunks_that_cancel_out_at_a_width_are_refused_only_there() -> None:
    rows = np.zeros((2, WIDTH), dtype=np.float32)
    rows[:, 0], rows[:, 1] = [1, -1], [0, 1]
    layout = AnswerLayout((TextLayout(20, ((0, 9), (7, 16)), (0.5, 0.5)),), "mean")
    assert np.isfinite(np.asarray(answer(call_of(), layout, rows, **FACTS))).all()
    with pytest.raises(AggregationError):
        answer(call_of(dimensions=1), layout, rows, **FACTS)
