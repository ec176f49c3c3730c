"""Known texts tell a worker that computes something else from one that does not."""

import hashlib
import json
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as laws
from hypothesis import strategies as st

from sutra_tasks.engines.encoder import TokenizedText
from sutra_tasks.engines.golden import (
    GOLDEN_TEXTS,
    LEAST_COSINE,
    VERSION,
    GoldenVectors,
    agree,
    compute_golden_vectors,
    lowest_cosine,
)
from sutra_tasks.engines.simulated_engine import SimulatedEncoder, vectors_of
from sutra_tasks.errors import CorruptResultError, UnsupportedVersionError
from sutra_tasks.vectors import Floats

WIDTH = 32
GOLDEN = GoldenVectors.of(SimulatedEncoder(width=WIDTH))
STORED = json.loads(GOLDEN.to_json())

POSITIONS = st.integers(0, len(GOLDEN_TEXTS) - 1)
BAD = st.sampled_from([float("nan"), float("inf"), float("-inf")])


class Broken(SimulatedEncoder):
    """Gives rows that are no directions."""

    def encode(self, batch: Sequence[TokenizedText]) -> Floats:
        rows = super().encode(batch)
        rows[0], rows[1, 0], rows[2, 0] = 0, np.nan, np.inf
        return rows


def like(vectors: Floats) -> GoldenVectors:
    return GoldenVectors(GOLDEN.space, vectors)


def test_the_texts_are_those_of_this_version() -> None:
    # Vectors of other texts cannot be compared: change both, or neither.
    digest = hashlib.sha256(json.dumps(GOLDEN_TEXTS).encode()).hexdigest()[:8]
    assert (VERSION, digest) == (1, "fffa5bc0")


def test_the_texts_are_short_and_unlike() -> None:
    lengths = [len(text) for text in GOLDEN_TEXTS]
    assert min(lengths) == 1
    assert 200 < max(lengths) < 1000
    assert sum(not text.isascii() for text in GOLDEN_TEXTS) >= 3
    rows = vectors_of(GOLDEN_TEXTS, 384)
    assert np.abs(rows @ rows.T - np.eye(len(rows))).max() < 0.4


def test_golden_vectors_are_the_vectors_of_the_texts() -> None:
    rows = compute_golden_vectors(SimulatedEncoder(width=WIDTH))
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows, vectors_of(GOLDEN_TEXTS, WIDTH), rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-6)


def test_two_workers_of_one_model_agree() -> None:
    other = GoldenVectors.of(SimulatedEncoder(width=WIDTH))
    assert GOLDEN.disagreement(other) is None
    assert agree(GOLDEN.vectors, other.vectors)


def test_another_space_is_named() -> None:
    other = GoldenVectors.of(SimulatedEncoder(width=8))
    assert other.disagreement(GOLDEN) == (
        "another embedding space: simulated-1:8, the fleet serves simulated-1:32"
    )


def test_another_shape_is_told() -> None:
    assert like(GOLDEN.vectors[:, :8]).disagreement(GOLDEN) == (
        "its vectors have another shape: 5x8, the fleet's 5x32"
    )
    assert not agree(GOLDEN.vectors[:, :8], GOLDEN.vectors)


@laws(max_examples=60, deadline=None)
@given(position=POSITIONS, cosine=st.floats(-1, 1))
def test_the_worst_text_decides(position: int, cosine: float) -> None:
    row = GOLDEN.vectors[position].astype(np.float64)
    beside = np.roll(row, 1) - row * (np.roll(row, 1) @ row)
    beside /= np.linalg.norm(beside)
    vectors = GOLDEN.vectors.copy()
    vectors[position] = 3 * (cosine * row + np.sqrt(1 - cosine**2) * beside)  # length says nothing
    assert lowest_cosine(vectors, GOLDEN.vectors) == pytest.approx(cosine, abs=1e-5)
    if abs(cosine - LEAST_COSINE) > 1e-5:
        assert agree(vectors, GOLDEN.vectors) == (cosine > LEAST_COSINE)
        assert (like(vectors).disagreement(GOLDEN) is None) == (cosine > LEAST_COSINE)


def test_a_disagreement_says_how_far() -> None:
    vectors = np.roll(GOLDEN.vectors, 1, axis=0)
    assert str(like(vectors).disagreement(GOLDEN)).startswith(
        "its vectors differ from the fleet's: cosine -0."
    )


@laws(max_examples=30, deadline=None)
@given(position=POSITIONS, column=st.integers(0, WIDTH - 1), bad=BAD)
def test_what_is_no_number_disagrees(position: int, column: int, bad: float) -> None:
    vectors = GOLDEN.vectors.copy()
    vectors[position, column] = bad
    assert like(vectors).disagreement(GOLDEN) == "its vectors differ from the fleet's: cosine nan"
    # Two that are broken alike do not agree, either.
    assert not agree(vectors, vectors)


def test_a_text_without_a_vector_agrees_with_itself_only() -> None:
    # A static model has no other vector of a text whose script its vocabulary lacks.
    vectors = GOLDEN.vectors.copy()
    vectors[2] = 0
    assert like(vectors).disagreement(like(vectors)) is None
    assert like(vectors).fault() is None
    assert like(vectors).disagreement(GOLDEN) is not None
    assert GOLDEN.disagreement(like(vectors)) is not None


def test_a_model_whose_vectors_are_all_zero_or_no_numbers_cannot_serve() -> None:
    nothing, broken = np.zeros_like(GOLDEN.vectors), GOLDEN.vectors.copy()
    broken[1, 3] = np.nan
    for vectors, said in ((nothing, "all known texts are zero"), (broken, "not numbers")):
        assert said in str(like(vectors).fault())
        assert not agree(vectors, vectors)
    assert GOLDEN.fault() is None


def test_a_broken_engine_is_compared_without_a_warning() -> None:
    assert GoldenVectors.of(Broken(width=WIDTH)).disagreement(GOLDEN) is not None


def test_half_precision_agrees() -> None:
    halves = GOLDEN.vectors.view(np.uint32) & np.uint32(0xFFFF0000)  # bfloat16
    assert like(halves.view(np.float32)).disagreement(GOLDEN) is None


def test_what_is_stored_is_read_again() -> None:
    read = GoldenVectors.from_json(GOLDEN.to_json().encode())
    assert read.space == GOLDEN.space
    assert read.vectors.dtype == np.float32
    np.testing.assert_array_equal(read.vectors, GOLDEN.vectors)


def test_another_version_is_refused() -> None:
    with pytest.raises(UnsupportedVersionError, match="golden vectors has version 2"):
        GoldenVectors.from_json(json.dumps({**STORED, "v": 2}))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        b"\xff",
        "null",
        "[]",
        '"text"',
        json.dumps({**STORED, "space": None}),
        json.dumps({**STORED, "vectors": [[1.0]]}),
        json.dumps({"v": VERSION}),
        json.dumps({**STORED, "vectors": {"__type__": "sutra.vectors"}}),
        json.dumps({**STORED, "vectors": {"__type__": "unheard.of", "__value__": 1}}),
        json.dumps(
            {**STORED, "vectors": {"__type__": "sutra.vectors", "__value__": {"v": 1, "shape": [5, 32]}}}
        ),
        GoldenVectors("s", GOLDEN.vectors[:4]).to_json(),
        GoldenVectors("s", GOLDEN.vectors[:, 0]).to_json(),
    ],
)
def test_what_is_damaged_is_said_to_be(text: str | bytes) -> None:
    with pytest.raises(CorruptResultError, match="stored vectors do not decode"):
        GoldenVectors.from_json(text)
