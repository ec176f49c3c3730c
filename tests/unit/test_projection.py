"""The narrower space: what the way there and back keeps, and that it is the same every time."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as laws
from hypothesis import strategies as st

from sutra_tasks.distillation.training import projection
from sutra_tasks.distillation.training.projection import ceiling, jl, lift, project, svd
from sutra_tasks.errors import InvalidOptionError
from sutra_tasks.vectors import Floats

SEEDS = st.integers(0, 2**32 - 1)


def drawn(seed: int, rows: int, width: int, *, decay: float = 0.0) -> Floats:
    """Return unit rows whose variance falls with the dimension, as that of real vectors does."""
    rng = np.random.default_rng(seed)
    scales = (1.0 + np.arange(width)) ** -decay
    basis = np.linalg.qr(rng.standard_normal((width, width)))[0]
    rows_ = (rng.standard_normal((rows, width)) * scales) @ basis
    unit: Floats = (rows_ / np.linalg.norm(rows_, axis=1, keepdims=True)).astype(np.float32)
    return unit


def cosine(a: Any, b: Any) -> Any:
    return np.sum(a * b, axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@pytest.mark.parametrize("kind", ["svd", "jl"])
@laws(max_examples=50, deadline=None)
@given(seed=SEEDS, rows=st.integers(1, 30), input_width=st.integers(1, 24), data=st.data())
def test_rows_are_orthonormal_even_beyond_the_rank_of_the_data(
    kind: str, seed: int, rows: int, input_width: int, data: st.DataObject
) -> None:
    width = data.draw(st.integers(1, input_width))
    vectors = drawn(seed, rows, input_width)
    matrix = (
        svd(vectors, width) if kind == "svd" else jl(input_width, width, np.random.default_rng(seed))
    )
    assert matrix.shape == (width, input_width)
    assert matrix.dtype == np.float32
    assert matrix.flags["C_CONTIGUOUS"]
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(width), atol=2e-6)


@laws(max_examples=50, deadline=None)
@given(seed=SEEDS, rows=st.integers(2, 30), input_width=st.integers(2, 24), data=st.data())
def test_no_projection_of_its_width_keeps_a_larger_mean_square_than_svd(
    seed: int, rows: int, input_width: int, data: st.DataObject
) -> None:
    width = data.draw(st.integers(1, input_width))
    vectors = drawn(seed, rows, input_width, decay=data.draw(st.floats(0, 2)))
    ours, other = svd(vectors, width), jl(input_width, width, np.random.default_rng(seed))
    kept, others = (np.mean(np.sum((vectors @ p.T) ** 2, axis=1)) for p in (ours, other))
    assert kept >= others - 1e-5


@laws(max_examples=30, deadline=None)
@given(seed=SEEDS, width=st.integers(4, 40))
def test_the_ceiling_of_svd_is_above_that_of_jl_on_vectors_as_models_give_them(
    seed: int, width: int
) -> None:
    vectors = drawn(seed, 200, 48, decay=0.5)
    ours, other = svd(vectors, width), jl(48, width, np.random.default_rng(seed))
    assert ceiling(ours, vectors) > ceiling(other, vectors)


def test_svd_finds_the_space_in_which_the_vectors_lie() -> None:
    rng = np.random.default_rng(0)
    vectors = (rng.standard_normal((100, 6)) @ rng.standard_normal((6, 40))).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert ceiling(svd(vectors, 6), vectors) == pytest.approx(1, abs=1e-6)
    assert ceiling(svd(vectors, 5), vectors) < 0.999


def test_svd_agrees_with_numpys() -> None:
    vectors = drawn(1, 300, 32, decay=1)
    ours, theirs = svd(vectors, 8), np.linalg.svd(vectors.astype(np.float64))[2][:8]
    np.testing.assert_allclose(np.abs(np.sum(ours * theirs, axis=1)), 1, atol=1e-5)


@pytest.mark.parametrize("kind", ["svd", "jl"])
def test_the_full_width_loses_nothing(kind: str) -> None:
    vectors = drawn(2, 50, 24)
    matrix = svd(vectors, 24) if kind == "svd" else jl(24, 24, np.random.default_rng(0))
    np.testing.assert_allclose(lift(matrix, project(matrix, vectors)), vectors, atol=1e-6)
    assert ceiling(matrix, vectors) == pytest.approx(1, abs=1e-6)
    narrow = project(matrix, vectors)
    np.testing.assert_allclose(narrow @ narrow.T, vectors @ vectors.T, atol=1e-6)


@pytest.mark.parametrize(("width", "most"), [(128, 0.70), (256, 0.43), (384, 0.34)])
def test_jl_keeps_pairwise_distances_within_its_bound(width: int, most: float) -> None:
    vectors = drawn(3, 60, 512, decay=0.5)
    narrow = vectors @ jl(512, width, np.random.default_rng(4)).T * np.sqrt(512 / width)
    first, second = np.triu_indices(60, 1)
    before = np.linalg.norm(vectors[first] - vectors[second], axis=1)
    after = np.linalg.norm(narrow[first] - narrow[second], axis=1)
    # Dasgupta and Gupta (2003): n points need a width of 4 ln n / (most**2 / 2 - most**3 / 3).
    assert width >= 4 * np.log(60) / (most**2 / 2 - most**3 / 3)
    assert np.abs((after / before) ** 2 - 1).max() < most
    assert np.mean(after / before) == pytest.approx(1, abs=0.05)


def test_jl_is_drawn_uniformly_so_that_no_direction_is_preferred() -> None:
    drawn_at = np.stack([jl(3, 1, np.random.default_rng(seed))[0] for seed in range(600)])
    # QR with the signs of LAPACK puts every first element on one side.
    assert np.abs(drawn_at.mean(axis=0)).max() < 0.1
    np.testing.assert_allclose(np.mean(drawn_at**2, axis=0), 1 / 3, atol=0.05)


def test_jl_is_what_its_generator_says() -> None:
    one, same, other = (jl(16, 4, np.random.default_rng(seed)) for seed in (5, 5, 6))
    np.testing.assert_array_equal(one, same)
    assert not np.allclose(one, other)


@laws(max_examples=30, deadline=None)
@given(seed=SEEDS)
def test_svd_has_one_sign_whatever_the_order_and_the_signs_of_the_vectors(seed: int) -> None:
    vectors = drawn(seed, 80, 12, decay=2)
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(vectors) * rng.choice([-1, 1], (80, 1)).astype(np.float32)
    ours = svd(vectors, 4)
    np.testing.assert_allclose(svd(shuffled, 4), ours, atol=1e-4)
    largest = np.argmax(np.abs(ours), axis=1)
    assert (ours[range(4), largest] > 0).all()


def test_vectors_in_several_blocks_are_one_set(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = drawn(7, 50, 12, decay=1)
    whole = svd(vectors, 5)
    monkeypatch.setattr(projection, "BLOCK_ROWS", 7)
    np.testing.assert_allclose(svd(vectors, 5), whole, atol=1e-6)


@pytest.mark.parametrize("width", [5, 64])
def test_the_ceiling_is_the_mean_cosine_of_the_way_there_and_back(width: int) -> None:
    vectors = drawn(8, 70, 64, decay=0.5)
    matrix = svd(vectors, width)
    back = vectors.astype(np.float64) @ matrix.T @ matrix
    assert ceiling(matrix, vectors) == pytest.approx(cosine(vectors, back).mean(), abs=1e-6)
    lifted = lift(matrix, project(matrix, vectors))
    assert ceiling(matrix, vectors) == pytest.approx(cosine(vectors, lifted).mean(), abs=1e-6)


@laws(max_examples=50, deadline=None)
@given(seed=SEEDS, noise=st.floats(0, 2))
def test_no_student_is_above_the_ceiling(seed: int, noise: float) -> None:
    vectors, rng = drawn(seed, 40, 16, decay=0.5), np.random.default_rng(seed)
    matrix = svd(vectors, 6)
    student = project(matrix, vectors) + noise * rng.standard_normal((40, 6)).astype(np.float32)
    assert cosine(vectors, lift(matrix, student)).mean() <= ceiling(matrix, vectors) + 1e-6


def test_what_is_projected_and_lifted_are_unit_rows_of_float32() -> None:
    matrix = jl(16, 4, np.random.default_rng(9))
    for rows in (
        project(matrix, 3 * drawn(9, 5, 16).astype(np.float64)),  # type: ignore[arg-type]
        lift(matrix, drawn(9, 5, 4)),
    ):
        assert rows.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)


def test_a_row_with_nothing_in_the_narrower_space_is_zero_and_not_nan() -> None:
    matrix = np.eye(3, dtype=np.float32)[:2]
    assert project(matrix, np.eye(3, dtype=np.float32)[2:]).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("width", [0, -1, 9])
def test_a_width_that_the_teacher_does_not_have_is_refused(width: int) -> None:
    with pytest.raises(InvalidOptionError, match=r"^output_dim=-?\d: expected 1 to 8,"):
        svd(drawn(0, 20, 8), width)
    with pytest.raises(InvalidOptionError, match=r"^output_dim=-?\d: expected 1 to 8,"):
        jl(8, width, np.random.default_rng(0))


@pytest.mark.parametrize("vectors", [np.zeros((0, 4)), np.full((3, 4), np.nan)])
def test_vectors_that_are_none_are_refused(vectors: Any) -> None:
    with pytest.raises(ValueError, match="finite"):
        svd(vectors.astype(np.float32), 2)
