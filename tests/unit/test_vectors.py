"""Vectors keep every bit in Celery's JSON, and are ordinary arrays before and after."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as laws
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from kombu.utils import json as kombu_json
from numpy.typing import NDArray

from sutra_tasks.errors import CorruptResultError, UnsupportedVersionError
from sutra_tasks.vectors import Embeddings, Floats, Vectors, finish

json: Any = kombu_json  # untyped

SHAPES = arrays.array_shapes(min_dims=1, max_dims=2, min_side=0, max_side=6)
# Any 32 bits: every NaN, infinity, subnormal and negative zero among them.
BITS = arrays.arrays(np.uint32, SHAPES)
TWO = {"v": 1, "shape": [2], "data": "AAAAAAAAgD8="}  # 0.0 and 1.0


def floats(values: list[Any]) -> Floats:
    return np.array(values, dtype=np.float32)


EMBEDDINGS = Embeddings(
    vectors=Vectors.of(floats([[1, 2], [3, 4]])),
    space="simulated-1:2",
    model="simulated",
    tokens=(3, 512),
    chunks=(1, 2),
    truncated=(True, False),
    spans=(((0, 9),), ((0, 2000), (1800, 3600))),
    weights=((1.0,), (0.5, 0.5)),
    chunk_vectors=Vectors.of(floats([[1, 2], [3, 4], [5, 6]])),
    device="gpu0",
    queue_s=0.25,
    compute_s=0.5,
)


def travelled(value: Any) -> Any:
    return json.loads(json.dumps(value))


def bits(array: Floats) -> list[Any]:
    found: list[Any] = np.asarray(array).astype("<f4").view("<u4").tolist()
    return found


@laws(max_examples=60, deadline=None)
@given(raw=BITS, order=st.sampled_from("<>"))
def test_every_float_arrives_bit_by_bit(raw: NDArray[np.uint32], order: str) -> None:
    array = raw.astype(f"{order}u4").view(f"{order}f4")
    vectors = Vectors.of(array)
    found = travelled(vectors)
    assert type(found) is type(vectors) is Vectors
    assert vectors.dtype == np.dtype("<f4")
    assert (found.shape, found.dtype) == (array.shape, np.dtype("<f4"))
    assert bits(found) == raw.tolist()


@laws(max_examples=30, deadline=None)
@given(raw=BITS)
def test_what_arrived_can_be_passed_on_and_written_to(raw: NDArray[np.uint32]) -> None:
    found = travelled(travelled(Vectors.of(raw.view(np.float32))))
    assert bits(found) == raw.tolist()
    found[...] = 0
    assert not found.any()


@pytest.mark.parametrize(
    "view",
    [
        lambda v: v,
        lambda v: v[1],
        lambda v: v[::2],
        lambda v: v[:, ::-1],
        lambda v: v.T,
        lambda v: v[:0],
        lambda v: v[v > 3],
        lambda v: v.copy(),
    ],
)
def test_a_part_of_vectors_travels_too(view: Any) -> None:
    part = view(Vectors.of(np.arange(12, dtype=np.float32).reshape(3, 4)))
    found = travelled(part)
    assert type(found) is Vectors
    assert found.tolist() == part.tolist()


def test_a_chord_body_gets_vectors_wherever_they_are_nested() -> None:
    one = Vectors.of(floats([1, 2]))
    found = travelled({"a": [one, {"b": one}], "c": EMBEDDINGS})
    parts = (found["a"][0], found["a"][1]["b"], found["c"].vectors[0])
    assert all(type(part) is Vectors and part.tolist() == [1, 2] for part in parts)


def test_embeddings_arrive_as_they_were() -> None:
    found = travelled(EMBEDDINGS)
    assert found.vectors.tolist() == EMBEDDINGS.vectors.tolist()
    assert EMBEDDINGS.chunk_vectors is not None
    assert found.chunk_vectors.tolist() == EMBEDDINGS.chunk_vectors.tolist()
    for name in (
        "space",
        "model",
        "tokens",
        "chunks",
        "truncated",
        "spans",
        "weights",
        "device",
        "queue_s",
    ):
        assert getattr(found, name) == getattr(EMBEDDINGS, name)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [3]},
        {"shape": [1]},
        {"shape": []},
        {"shape": [1, 1, 2]},
        {"shape": [-2]},
        {"shape": [-1, -2]},
        {"shape": [True, 2]},
        {"shape": [2.0]},
        {"shape": ["2"]},
        {"shape": 2},
        {"shape": None},
        {"data": "AAAAAAAAgD8"},
        {"data": "AAAAAAAAgD8="[:-4]},
        {"data": "AAAA AAAAgD8="},
        {"data": "\u00e9" * 12},
        {"data": ""},
        {"data": None},
        {"data": [0.0, 1.0]},
    ],
)
def test_a_corrupt_record_is_refused(change: dict[str, Any]) -> None:
    assert travelled({"__type__": "sutra.vectors", "__value__": TWO}).tolist() == [0, 1]
    with pytest.raises(CorruptResultError):
        travelled({"__type__": "sutra.vectors", "__value__": TWO | change})


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": None},
        {"chunks": 1},
        {"vectors": [1.0, 2.0]},
        {"vectors": None},
        {"later": 1},
    ],
)
def test_corrupt_embeddings_are_refused(change: dict[str, Any]) -> None:
    record = EMBEDDINGS.__json__()
    record["__value__"] |= change
    with pytest.raises(CorruptResultError):
        travelled(record)


def test_embeddings_without_a_field_are_refused() -> None:
    for name in EMBEDDINGS.__slots__:
        record = EMBEDDINGS.__json__()
        del record["__value__"][name]
        with pytest.raises(CorruptResultError, match=name):
            travelled(record)


@pytest.mark.parametrize("kind", ["sutra.vectors", "sutra.embeddings"])
@pytest.mark.parametrize("version", [3, 0, None, "1", "x" * 100])
def test_a_record_of_another_version_is_refused(kind: str, version: object) -> None:
    with pytest.raises(UnsupportedVersionError, match=kind) as refused:
        travelled({"__type__": kind, "__value__": TWO | {"v": version}})
    assert len(refused.value.version) <= 20


@pytest.mark.parametrize("kind", ["sutra.vectors", "sutra.embeddings"])
@pytest.mark.parametrize("value", [None, [], "x", 1])
def test_a_record_that_is_no_object_is_refused(kind: str, value: object) -> None:
    with pytest.raises(CorruptResultError):
        travelled({"__type__": kind, "__value__": value})


def test_embeddings_are_shown_in_short() -> None:
    assert repr(EMBEDDINGS) == "<Embeddings 2 texts, 3 chunks, simulated-1:2>"


@pytest.mark.parametrize("shape", [(0,), (384,), (0, 384), (10_000, 8)])
def test_repr_is_short_whatever_the_size(shape: tuple[int, ...]) -> None:
    vectors = Vectors.of(np.zeros(shape, np.float32))
    assert repr(vectors) == f"<Vectors {'x'.join(map(str, shape))} float32>"


def test_arithmetic_gives_ordinary_arrays_and_scalars() -> None:
    vectors = Vectors.of(floats([[3, 4], [0, 2]]))
    assert type(vectors) is Vectors
    for found in (vectors + 1, -vectors, vectors @ vectors.T, vectors > 0, vectors.mean(axis=0)):
        assert type(found) is np.ndarray
    assert type(vectors.sum()) is type(vectors[0] @ vectors[1]) is np.float32
    assert np.linalg.norm(vectors, axis=1).tolist() == [5, 2]


ROWS = arrays.arrays(
    np.float32,
    st.tuples(st.integers(0, 5), st.just(8)),
    elements=st.sampled_from([0.0, -0.0, 1e-3, 0.5, -1.0, 3.0, -1e3]),
)


@laws(max_examples=60, deadline=None)
@given(rows=ROWS, dimensions=st.none() | st.integers(1, 8))
def test_rows_are_cut_before_they_are_brought_to_unit_length(
    rows: Floats, dimensions: int | None
) -> None:
    cut = rows[:, : dimensions or 8].astype(np.float64)
    norms = np.linalg.norm(cut, axis=1, keepdims=True)
    found = finish(rows, dimensions=dimensions, normalize=True)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, cut / np.where(norms == 0, 1, norms), rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), norms[:, 0] > 0, rtol=1e-5)


def test_rows_are_only_cut_when_no_unit_length_is_asked() -> None:
    rows = floats([[3, 4, 12]])
    assert finish(rows, dimensions=2, normalize=False).tolist() == [[3, 4]]
    assert finish(rows, dimensions=None, normalize=False).tolist() == [[3, 4, 12]]
