"""What is measured of a student: exact on known cases, and intervals that hold what they say."""

import importlib
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as laws
from hypothesis import strategies as st

from sutra_tasks.distillation.measuring import bootstrap as bootstrap_module
from sutra_tasks.distillation.measuring import ranking
from sutra_tasks.distillation.measuring.bootstrap import Interval, bootstrap, ratio_of_means
from sutra_tasks.distillation.measuring.correlation import (
    draw_pairs,
    ranks,
    spearman,
    spearman_interval,
)
from sutra_tasks.distillation.measuring.quality import LabelledRetrieval, measure_quality
from sutra_tasks.distillation.measuring.ranking import (
    cosines,
    ndcg,
    neighbour_overlap,
    neighbours,
    padded,
    ranking_ndcg,
    squared_errors,
    unit,
)
from sutra_tasks.distillation.training.projection import ceiling, project, svd
from sutra_tasks.vectors import Floats

scipy: Any = importlib.import_module("scipy.stats")  # it carries no type information
SEEDS = st.integers(0, 2**32 - 1)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def drawn(seed: int, rows: int, width: int) -> Floats:
    return unit(rng(seed).standard_normal((rows, width)).astype(np.float32))


def turned(vectors: Floats, seed: int) -> Floats:
    width = vectors.shape[1]
    turn = np.linalg.qr(rng(seed).standard_normal((width, width)))[0]
    rotated: Floats = (vectors @ turn).astype(np.float32)
    return rotated


def plain_ndcg(scores: Any, gains: dict[int, float], k: int) -> float:
    order = np.argsort(-scores)[:k]
    got = sum(gains.get(int(d), 0.0) / math.log2(2 + place) for place, d in enumerate(order))
    best = sorted(gains.values(), reverse=True)[:k]
    return got / sum(gain / math.log2(2 + place) for place, gain in enumerate(best))


# --- rows against rows


@laws(max_examples=50, deadline=None)
@given(seed=SEEDS, scale=st.floats(0.01, 100))
def test_cosines_and_squared_errors_of_unit_rows_say_the_same(seed: int, scale: float) -> None:
    a, b = drawn(seed, 20, 8), np.float32(scale) * drawn(seed + 1, 20, 8)
    expected = np.sum(a * b, axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(cosines(a, b), expected, atol=1e-5)
    np.testing.assert_allclose(squared_errors(a, b), 2 - 2 * cosines(a, b), atol=1e-5)


def test_a_row_of_zeros_is_like_nothing() -> None:
    zero = np.zeros((1, 4), dtype=np.float32)
    assert cosines(zero, drawn(0, 1, 4)).tolist() == [0.0]


# --- bootstrap


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution() -> None:
    values = rng(1).normal(3, 2, 2_000)
    found = bootstrap(values, rng=rng(2))
    error = values.std() / math.sqrt(2_000)
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.3 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.3 * error)


def test_an_interval_holds_the_true_mean_as_often_as_it_says() -> None:
    source, held = rng(3), 0
    for _ in range(400):
        found = bootstrap(source.exponential(1.0, 150), rng=source, repeats=300, share=0.8)
        held += found.low <= 1 <= found.high
    assert 0.72 < held / 400 < 0.86


def test_an_interval_narrows_with_the_root_of_the_values() -> None:
    few, many = (bootstrap(rng(4).normal(size=n), rng=rng(5)) for n in (100, 10_000))
    assert (few.high - few.low) / (many.high - many.low) == pytest.approx(10, rel=0.25)


def test_resamples_in_blocks_are_those_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    values = rng(6).normal(size=50)
    whole = bootstrap(values, rng=rng(7), repeats=100)
    monkeypatch.setattr(bootstrap_module, "BLOCK_DRAWS", 350)
    assert bootstrap(values, rng=rng(7), repeats=100) == whole


def test_a_statistic_other_than_the_mean_is_taken_of_each_resample() -> None:
    found = bootstrap(np.arange(1_001.0), lambda samples: np.percentile(samples, 5, axis=1), rng=rng(8))
    assert found.value == 50
    assert 30 < found.low < 50 < found.high < 70


def test_one_value_is_its_own_interval_and_none_is_refused() -> None:
    assert bootstrap(np.array([2.5]), rng=rng()) == Interval(2.5, 2.5, 2.5)
    with pytest.raises(ValueError, match="nothing to measure"):
        bootstrap(np.array([]), rng=rng())


# --- similarities of pairs


@laws(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_ranks_are_scipys_of_values_repeated_by_their_weights(drawn: list[tuple[int, int]]) -> None:
    values, weights = np.array(drawn).T
    repeated = np.repeat(values, weights)
    expected = dict(zip(repeated.tolist(), scipy.rankdata(repeated).tolist(), strict=True))
    found = ranks(np.unique(values, return_inverse=True)[1], weights.astype(np.float64))
    for value, weight, rank in zip(values.tolist(), weights, found, strict=True):
        assert not weight or rank == expected[value]


@pytest.mark.parametrize("noise", [0.0, 0.3, 3.0])
def test_spearman_is_scipys(noise: float) -> None:
    a = drawn(9, 60, 8)
    b = unit(a + np.float32(noise) * drawn(10, 60, 8))
    pairs = draw_pairs(60, 10_000, rng())
    first, second = pairs.T
    expected = scipy.spearmanr(
        np.sum(a[first] * a[second], axis=1), np.sum(b[first] * b[second], axis=1)
    )
    assert spearman(a, b, pairs) == pytest.approx(expected.statistic, abs=1e-5)


def test_spearman_with_ties_is_scipys() -> None:
    a, b = (unit(rng(seed).integers(-1, 2, (40, 3)) + np.float32(0.5)) for seed in (11, 12))
    pairs = draw_pairs(40, 10_000, rng())
    first, second = pairs.T
    cosine = [np.round(np.sum(v[first] * v[second], axis=1), 5) for v in (a, b)]
    assert len(np.unique(cosine[0])) < 100
    assert spearman(a, b, pairs) == pytest.approx(scipy.spearmanr(*cosine).statistic, abs=1e-6)


def test_a_resample_of_texts_is_the_correlation_of_the_texts_it_holds() -> None:
    a, b = drawn(13, 12, 4), drawn(14, 12, 4)
    found = spearman_interval(a, b, draw_pairs(12, 10_000, rng()), rng=rng(15), repeats=1)
    texts = rng(15).integers(12, size=12)
    pairs = np.stack(np.triu_indices(12, 1), axis=1)
    # A text and its own copy are no pair.
    pairs = pairs[texts[pairs[:, 0]] != texts[pairs[:, 1]]]
    assert found.low == pytest.approx(spearman(a[texts], b[texts], pairs), abs=1e-9)


def test_the_interval_of_spearman_holds_that_of_all_texts() -> None:
    a = drawn(16, 3_000, 16)
    b = unit(a + np.float32(0.5) * drawn(17, 3_000, 16))
    true, source, held = spearman(a, b, draw_pairs(3_000, 200_000, rng(18))), rng(19), 0
    for _ in range(40):
        some = source.choice(3_000, 80, replace=False)
        pairs = draw_pairs(80, 2_000, source)
        found = spearman_interval(a[some], b[some], pairs, rng=source, repeats=100)
        held += found.low <= true <= found.high
    assert held >= 33


def test_pairs_are_of_different_texts_and_no_more_than_there_are() -> None:
    every = draw_pairs(6, 15, rng())
    assert {tuple(pair) for pair in every.tolist()} == {
        (i, j) for i in range(6) for j in range(i + 1, 6)
    }
    some = draw_pairs(7, 20, rng(20))
    assert some.shape == (20, 2)
    assert (some[:, 0] != some[:, 1]).all()
    many = draw_pairs(200, 19_000, rng(21))
    assert np.bincount(many.ravel(), minlength=200).std() < 20


def test_vectors_that_are_all_one_correlate_with_nothing() -> None:
    same = np.ones((20, 4), dtype=np.float32)
    pairs = draw_pairs(20, 1_000, rng())
    assert spearman(same, same, pairs) == 0.0


# --- neighbours and rankings


@laws(max_examples=30, deadline=None)
@given(seed=SEEDS, rows=st.integers(3, 40), k=st.integers(1, 12))
def test_neighbours_are_the_nearest_others_in_order(seed: int, rows: int, k: int) -> None:
    vectors = drawn(seed, rows, 6)
    scores = vectors @ vectors.T
    np.fill_diagonal(scores, -np.inf)
    np.testing.assert_array_equal(
        neighbours(vectors, k), np.argsort(-scores, axis=1)[:, : min(k, rows - 1)]
    )


def test_overlap_is_the_share_in_common() -> None:
    a, b = drawn(22, 50, 8), unit(drawn(22, 50, 8) + np.float32(0.3) * drawn(23, 50, 8))
    expected = [len(set(x) & set(y)) / 10 for x, y in zip(neighbours(a), neighbours(b), strict=True)]
    np.testing.assert_allclose(neighbour_overlap(a, b), expected)
    assert 0.1 < np.mean(expected) < 0.9


@laws(max_examples=60, deadline=None)
@given(seed=SEEDS, k=st.integers(1, 12))
def test_ndcg_is_the_textbooks(seed: int, k: int) -> None:
    queries, documents = drawn(seed, 9, 5), drawn(seed + 1, 30, 5)
    answers = [
        rng(seed + i).choice(30, size=1 + i % 4, replace=False).tolist() for i in range(len(queries))
    ]
    relevant, ones = padded(answers)
    gains = ones * rng(seed).uniform(0.1, 3, ones.shape)
    expected = [
        plain_ndcg(query @ documents.T, dict(zip(one, gain.tolist(), strict=False)), k)
        for query, one, gain in zip(queries, answers, gains, strict=True)
    ]
    np.testing.assert_allclose(ndcg(queries, documents, relevant, gains, k), expected, atol=1e-9)
    one = np.array([answer[0] for answer in answers])
    expected = [plain_ndcg(q @ documents.T, {d: 1.0}, k) for q, d in zip(queries, one, strict=True)]
    np.testing.assert_allclose(ndcg(queries, documents, one, k=k), expected, atol=1e-9)


def test_a_model_that_gives_every_text_one_vector_finds_no_more_than_chance() -> None:
    same = np.ones((100, 4), dtype=np.float32)
    chance = sum(1 / math.log2(2 + place) for place in range(10)) / 100
    found = ndcg(same, same, np.arange(100))
    np.testing.assert_allclose(found, chance, atol=1e-9)


def test_documents_that_are_rounding_apart_share_their_places() -> None:
    first = np.array([[1.0, 0.0]], dtype=np.float32)
    documents = np.array([[1.0, 0.0], [1.0 - 3e-7, 0.0]], dtype=np.float32)
    documents[1, 1] = 8e-4  # of unit length, and its cosine is 3e-7 less
    for answer in (0, 1):
        shared = (1 + 1 / math.log2(3)) / 2
        assert ndcg(first, documents, np.array([answer]))[0] == pytest.approx(shared, abs=1e-9)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = drawn(24, 60, 8), drawn(25, 60, 8)
    whole = neighbours(a), ranking_ndcg(a, b), ndcg(a[:20], b, np.arange(20))
    monkeypatch.setattr(ranking, "BLOCK_ROWS", 7)
    parts = neighbours(a), ranking_ndcg(a, b), ndcg(a[:20], b, np.arange(20))
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-9)


def test_the_teachers_own_ranking_is_graded_from_its_nearest_down() -> None:
    a, b = drawn(26, 30, 4), unit(drawn(26, 30, 4) + np.float32(0.5) * drawn(27, 30, 4))
    scores = b @ b.T
    np.fill_diagonal(scores, -np.inf)
    expected = [
        plain_ndcg(scores[i], {int(d): 10.0 - r for r, d in enumerate(neighbours(a)[i])}, 10)
        for i in range(30)
    ]
    np.testing.assert_allclose(ranking_ndcg(a, b), expected, atol=1e-9)


@pytest.mark.parametrize(
    "of",
    [
        lambda a, b: float(np.mean(neighbour_overlap(a, b))),
        lambda a, b: float(np.mean(ranking_ndcg(a, b))),
        lambda a, b: spearman(a, b, draw_pairs(len(a), 20_000, rng(28))),
    ],
    ids=["top10", "ranking_ndcg", "spearman"],
)
def test_equal_is_1_unrelated_is_near_0_and_rotation_changes_nothing(of: Any) -> None:
    a, other = drawn(29, 300, 16), drawn(30, 300, 16)
    between = unit(a + np.float32(0.5) * other)
    assert of(a, a) == pytest.approx(1, abs=1e-9)
    assert abs(of(a, other)) < 0.06
    assert 0.1 < of(a, between) < 0.95
    assert of(a, turned(between, 31)) == pytest.approx(of(a, between), abs=2e-3)


def test_the_ratio_compares_both_models_on_the_same_queries() -> None:
    teacher = rng(32).uniform(0.1, 1, 400)
    found = ratio_of_means(teacher, 0.9 * teacher, rng=rng(33))
    assert found is not None
    # Resampled apart, the interval would be a tenth wide.
    assert (found.low, found.value, found.high) == pytest.approx((0.9, 0.9, 0.9))
    assert ratio_of_means(np.zeros(5), np.ones(5), rng=rng()) is None
    rare = ratio_of_means(np.array([1.0, 0.0]), np.array([0.5, 0.0]), rng=rng())
    assert rare is not None
    assert rare == Interval(0.5, 0.5, 0.5)


# --- the whole


def test_the_teacher_projected_is_as_good_as_its_projection_allows() -> None:
    teacher = unit((rng(34).standard_normal((300, 24)) * (1.0 + np.arange(24)) ** -0.5).astype("f4"))
    matrix = svd(teacher, 12)
    found = measure_quality(teacher, 3 * project(matrix, teacher), matrix, rng=rng(35), repeats=100)
    assert found.texts == 300
    assert found.cosine.value == pytest.approx(1)
    assert found.mse.value == pytest.approx(0, abs=1e-6)
    assert found.ceiling == pytest.approx(ceiling(matrix, teacher), abs=1e-6)
    assert found.lifted_cosine.value == pytest.approx(found.ceiling, abs=1e-6)
    assert found.spearman.low <= found.spearman.value <= found.spearman.high < 1
    assert found.ndcg_ratio is found.ndcg_teacher is found.ndcg_student is None


def test_labels_give_the_ratio_and_what_it_is_made_of() -> None:
    documents = drawn(36, 80, 16)
    queries = unit(documents[:40] + np.float32(0.3) * drawn(37, 40, 16))
    blurred = unit(queries + np.float32(2) * drawn(38, 40, 16))
    found = measure_quality(
        documents,
        documents,
        np.eye(16, dtype=np.float32),
        rng=rng(39),
        labelled=LabelledRetrieval(queries, documents, blurred, documents, np.arange(40)),
        repeats=50,
    )
    assert found.ndcg_teacher is not None
    assert found.ndcg_student is not None
    assert found.ndcg_ratio is not None
    assert found.ndcg_teacher.value == np.mean(ndcg(queries, documents, np.arange(40)))
    assert found.ndcg_ratio.value == pytest.approx(found.ndcg_student.value / found.ndcg_teacher.value)
    assert found.ndcg_ratio.low < found.ndcg_ratio.value < 0.9


def test_quality_is_json_and_the_same_for_the_same_generator() -> None:
    teacher = drawn(40, 50, 8)
    student = unit(teacher + np.float32(0.2) * drawn(41, 50, 8))
    one, same = (
        measure_quality(teacher, student, np.eye(8, dtype=np.float32), rng=rng(42), repeats=20)
        for _ in "ab"
    )
    assert one == same
    stored = json.loads(json.dumps(one.to_json(), allow_nan=False))
    assert stored["cosine"] == {
        "value": one.cosine.value,
        "low": one.cosine.low,
        "high": one.cosine.high,
    }
    assert stored["cosine_p5"]["value"] == np.percentile(cosines(teacher, student), 5)
    assert stored["ndcg_ratio"] is None
