"""How much each chunk counts, by the specification's examples and brute force, and their one vector."""

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import settings as laws
from hypothesis import strategies as st

from sutra_tasks.chunking import weights
from sutra_tasks.chunking.weights import METHODS, aggregate, chunk_weights
from sutra_tasks.vectors import Floats

Spans = list[tuple[int, int]]


@st.composite
def windows(draw: st.DrawFn) -> Spans:
    """Draw chunks as a chunker cuts them, and others: many may have the same token."""
    spans = [(0, draw(st.integers(1, 20)))]
    for _ in range(draw(st.integers(0, 8))):
        before, covered = spans[-1]
        start = draw(st.integers(before + 1, covered))
        spans.append((start, draw(st.integers(covered + 1, covered + 20))))
    return spans


WINDOWS = windows()
ROWS = st.tuples(st.integers(1, 6), st.integers(0, 2**32)).map(
    lambda drawn: np.random.default_rng(drawn[1]).normal(size=(drawn[0], 8)).astype(np.float32)
)
ANY_METHOD = st.sampled_from(list(METHODS))
every_method = pytest.mark.parametrize("method", METHODS)
either_way = pytest.mark.parametrize("seed_exact", [False, True])


def shares(parts: Sequence[Fraction | int]) -> list[float]:
    """Divide weights by their sum; equal weights if the sum is zero."""
    total = sum(parts)
    return [float(Fraction(part) / total) if total else 1 / len(parts) for part in parts]


def covering(spans: Spans) -> Counter[int]:
    """Return how many chunks hold each token."""
    return Counter(token for start, end in spans for token in range(start, end))


# The weights of chunks.


def test_overlap_aware_is_first_and_every_method_is_there() -> None:
    assert list(METHODS) == ["overlap_aware", "mean", "positional", "max"]


@laws(max_examples=60, deadline=None)
@given(method=ANY_METHOD, seed_exact=st.booleans(), spans=WINDOWS)
def test_weights_are_shares_of_one(method: str, seed_exact: bool, spans: Spans) -> None:
    found = chunk_weights(spans, method, seed_exact=seed_exact)
    assert found.dtype == np.float64
    assert found.shape == (len(spans),)
    assert (found >= 0).all()
    assert found.sum() == pytest.approx(1, rel=1e-12)


@every_method
@either_way
def test_one_chunk_alone_has_all_the_weight(method: str, seed_exact: bool) -> None:
    assert chunk_weights([(0, 7)], method, seed_exact=seed_exact).tolist() == [1.0]


@pytest.mark.parametrize("method", ["mean", "max"])
@either_way
def test_mean_and_max_weigh_chunks_alike(method: str, seed_exact: bool) -> None:
    assert (
        chunk_weights([(0, 9), (1, 10), (5, 50)], method, seed_exact=seed_exact).tolist() == [1 / 3] * 3
    )


@pytest.mark.parametrize(
    ("chunks", "parts"),
    [
        (1, [1]),
        (2, [1, 1]),
        (3, [1, 3, 1]),
        (4, [1, 3, 3, 1]),  # ¼, ¾, ¾, ¼ before they are normalised
        (5, [1, 3, 5, 3, 1]),
    ],
)
def test_positional_weighs_the_middle_most(chunks: int, parts: list[int]) -> None:
    spans = [(at, at + 1) for at in range(chunks)]
    assert chunk_weights(spans, "positional").tolist() == pytest.approx(shares(parts), rel=1e-12)


@pytest.mark.parametrize(
    ("chunks", "parts"),
    [
        (1, [1]),  # nothing by the letter: the mean
        (2, [0, 1]),
        (3, [0, 2, 2]),
        (4, [0, 1, 2, 1]),
        (5, [0, 2, 4, 4, 2]),
    ],
)
def test_positional_to_the_letter_gives_the_first_nothing(chunks: int, parts: list[int]) -> None:
    spans = [(at, at + 1) for at in range(chunks)]
    found = chunk_weights(spans, "positional", seed_exact=True)
    assert found.tolist() == pytest.approx(shares(parts), rel=1e-12)


@either_way
@laws(max_examples=50, deadline=None)
@given(chunks=st.integers(1, 60))
def test_positional_is_the_specifications_formula(seed_exact: bool, chunks: int) -> None:
    half = Fraction(chunks, 2)
    at = [Fraction(i) if seed_exact else i + Fraction(1, 2) for i in range(chunks)]
    expected = shares([1 - abs(i - half) / half for i in at])
    spans = [(i, i + 1) for i in range(chunks)]
    found = chunk_weights(spans, "positional", seed_exact=seed_exact)
    assert found.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-15)
    if not seed_exact:
        assert found.tolist() == pytest.approx(found[::-1].tolist(), rel=1e-9)


@pytest.mark.parametrize(
    ("spans", "tokens"),
    [
        ([(0, 4), (4, 8)], [4, 4]),  # nothing shared
        ([(0, 4), (2, 6)], [3, 3]),
        ([(0, 4), (1, 5), (2, 6)], [13 / 6, 5 / 3, 13 / 6]),  # held by 1, 2, 3, 3, 2, 1
        ([(0, 512), (462, 974), (924, 1000)], [487, 462, 51]),  # a short tail
        (
            [(0, 20), (15, 35), (19, 39)],
            [15 + 2 + 1 / 3, 2 + 1 / 3 + 7.5, 1 / 3 + 7.5 + 4],
        ),  # one that was moved back
    ],
)
def test_overlap_aware_counts_every_token_once(spans: Spans, tokens: list[float]) -> None:
    found = chunk_weights(spans, "overlap_aware") * spans[-1][1]
    assert found.tolist() == pytest.approx(tokens, rel=1e-12)


@laws(max_examples=50, deadline=None)
@given(spans=WINDOWS)
def test_overlap_aware_shares_each_token_among_the_chunks_that_hold_it(spans: Spans) -> None:
    cover = covering(spans)
    parts = [sum(Fraction(1, cover[token]) for token in range(*span)) for span in spans]
    assert sum(parts) == spans[-1][1]
    assert chunk_weights(spans, "overlap_aware").tolist() == pytest.approx(shares(parts), rel=1e-9)


@laws(max_examples=50, deadline=None)
@given(spans=WINDOWS)
def test_overlap_aware_to_the_letter_is_the_ratio_of_unique_content(spans: Spans) -> None:
    cover = covering(spans)
    ratios = [
        Fraction(sum(cover[token] == 1 for token in range(start, end)), end - start)
        for start, end in spans
    ]
    found = chunk_weights(spans, "overlap_aware", seed_exact=True)
    assert found.tolist() == pytest.approx(shares(ratios), rel=1e-9, abs=1e-15)


@pytest.mark.parametrize(
    ("spans", "parts"),
    [
        ([(0, 4), (4, 8)], [1, 1]),
        ([(0, 10), (5, 15), (10, 20)], [1, 0, 1]),
        ([(0, 100), (90, 110)], [0.9, 0.5]),  # too much for a short tail: 36 %, not 14 %
    ],
)
def test_the_ratio_of_unique_content_by_hand(spans: Spans, parts: list[float]) -> None:
    found = chunk_weights(spans, "overlap_aware", seed_exact=True)
    assert found.tolist() == pytest.approx([part / sum(parts) for part in parts], rel=1e-12)


@pytest.mark.parametrize(("tail", "share"), [(1, 0.01), (25, 0.2), (100, 0.5)])
def test_a_short_tail_gets_its_share(tail: int, share: float) -> None:
    found = chunk_weights([(0, 100), (100, 100 + tail)], "overlap_aware")
    assert found[1] == pytest.approx(share, rel=0.02)


def test_a_long_texts_weights_lose_no_precision() -> None:
    spans = [(at, at + 512) for at in range(0, 10**6, 462)]
    found = chunk_weights(spans, "overlap_aware") * spans[-1][1]
    assert found[1:-1].tolist() == pytest.approx([462] * (len(spans) - 2), rel=1e-9)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(KeyError):
        chunk_weights([(0, 1)], "median")


# One vector from many.


def cosine(one: Floats, other: Floats) -> float:
    a, b = one.astype(np.float64), other.astype(np.float64)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def equal_weights(rows: Floats) -> weights.Weights:
    return np.full(len(rows), 1 / len(rows))


@laws(max_examples=50, deadline=None)
@given(method=ANY_METHOD, rows=ROWS, spread=st.integers(0, 2**32))
def test_the_vector_is_that_of_unit_rows_in_double_precision(
    method: str, rows: Floats, spread: int
) -> None:
    shares = np.random.default_rng(spread).dirichlet(np.ones(len(rows)))
    unit = rows.astype(np.float64) / np.sqrt((rows.astype(np.float64) ** 2).sum(axis=1, keepdims=True))
    expected = unit.max(axis=0) if method == "max" else (shares[:, None] * unit).sum(axis=0)
    assume(np.linalg.norm(expected) > 1e-3)
    found = aggregate(rows, shares, method)
    assert found.dtype == np.float32
    assert found.shape == (8,)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "expected"), [("overlap_aware", [0.75 * 0.6, 0.75 * 0.8 + 0.25]), ("max", [0.6, 1.0])]
)
def test_rows_are_brought_to_unit_length_first(method: str, expected: list[float]) -> None:
    rows = np.array([[3, 4], [0, 100]], dtype=np.float32)
    found = aggregate(rows, np.array([0.75, 0.25]), method)
    assert found.tolist() == pytest.approx(expected, rel=1e-6)


def test_max_takes_the_largest_of_each_element_not_the_furthest_from_zero() -> None:
    rows = np.array([[0.6, -0.8, 0.0], [-0.8, 0.0, -0.6]], dtype=np.float32)
    assert aggregate(rows, np.array([0.5, 0.5]), "max").tolist() == pytest.approx([0.6, 0, 0])


@laws(max_examples=50, deadline=None)
@given(method=ANY_METHOD, rows=ROWS, data=st.data())
def test_no_chunk_counts_by_the_length_of_its_vector(
    method: str, rows: Floats, data: st.DataObject
) -> None:
    scale = data.draw(st.lists(st.floats(1e-3, 1e6), min_size=len(rows), max_size=len(rows)))
    scaled = rows * np.array(scale, dtype=np.float32)[:, None]
    found = aggregate(scaled, equal_weights(rows), method)
    np.testing.assert_allclose(found, aggregate(rows, equal_weights(rows), method), atol=1e-6)


@laws(max_examples=50, deadline=None)
@given(method=ANY_METHOD, rows=ROWS)
def test_one_chunk_alone_keeps_its_direction(method: str, rows: Floats) -> None:
    assert cosine(aggregate(rows[:1], np.ones(1), method), rows[0]) == pytest.approx(1, abs=1e-6)


@laws(max_examples=50, deadline=None)
@given(method=ANY_METHOD, rows=ROWS, seed=st.integers(0, 2**32))
def test_chunks_with_their_weights_may_come_in_any_order(method: str, rows: Floats, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shares, order = rng.dirichlet(np.ones(len(rows))), rng.permutation(len(rows))
    found = aggregate(rows[order], shares[order], method)
    np.testing.assert_allclose(found, aggregate(rows, shares, method), atol=1e-6)


def test_order_counts_where_the_weights_say_so() -> None:
    rows = np.eye(3, dtype=np.float32)
    shares = chunk_weights([(0, 4), (3, 9), (8, 10)], "overlap_aware")
    assert not np.allclose(aggregate(rows[::-1], shares, "mean"), aggregate(rows, shares, "mean"))
    np.testing.assert_array_equal(aggregate(rows[::-1], shares, "max"), aggregate(rows, shares, "max"))


def test_rows_are_left_as_they_were() -> None:
    rows = np.array([[3, 4], [0, 100]], dtype=np.float32)
    before = rows.copy()
    for method in METHODS:
        aggregate(rows, np.array([0.5, 0.5]), method)
    np.testing.assert_array_equal(rows, before)


@every_method
@pytest.mark.parametrize("value", [0.0, np.nan, np.inf, -np.inf])
def test_a_row_without_a_direction_is_refused(method: str, value: float) -> None:
    rows = np.ones((3, 4), dtype=np.float32)
    rows[1] = value
    with pytest.raises(ValueError, match="chunk is zero, or not finite"):
        aggregate(rows, equal_weights(rows), method)
    rows[1] = [1, 0, 0, value]
    if value:
        with pytest.raises(ValueError, match="chunk is zero, or not finite"):
            aggregate(rows, equal_weights(rows), method)


@pytest.mark.parametrize(
    ("method", "rows"),
    [
        ("mean", [[1, 2, 3], [-1, -2, -3]]),
        ("overlap_aware", [[0.1, 0.2, 0.3], [-7, -14, -21]]),  # but for rounding
        ("max", [[-1, 0, 0], [0, -1, 0]]),
    ],
)
def test_rows_that_cancel_out_are_refused(method: str, rows: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="cancel out"):
        aggregate(np.array(rows, dtype=np.float32), np.array([0.5, 0.5]), method)


def test_rows_that_nearly_cancel_out_still_have_a_direction() -> None:
    rows = np.array([[1, 0.001], [-1, 0.001]], dtype=np.float32)
    found = aggregate(rows, np.array([0.5, 0.5]), "mean")
    assert cosine(found, np.array([0, 1], dtype=np.float32)) == pytest.approx(1, abs=1e-3)
