"""Vectors in messages and results: float32 bytes in JSON, and numpy arrays in Python.

The JSON form, for readers in any language::

    {"__type__": "sutra.vectors",
     "__value__": {"v": 1, "shape": [2, 384], "data": "<base64 of little-endian float32, row-major>"}}

A result with details has it inside a ``sutra.embeddings`` object; see :class:`Embeddings`.
"""

from __future__ import annotations

import binascii
import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from kombu.utils import json as kombu_json
from numpy.typing import NDArray

from sutra_tasks.errors import CorruptResultError, UnsupportedVersionError

try:
    import pybase64 as base64  # ten times faster: it comes with the extra `worker`
except ModuleNotFoundError:
    import base64  # type: ignore[no-redef]

__all__ = ["VERSION", "Embeddings", "Floats", "Vectors", "finish", "register"]

VERSION: Final = 1
EMBEDDINGS_VERSION: Final = 2
MOST: Final = 2**31
VECTORS_TYPE: Final = "sutra.vectors"
EMBEDDINGS_TYPE: Final = "sutra.embeddings"

Floats = NDArray[np.float32]


class Vectors(np.ndarray[Any, np.dtype[np.float32]]):
    """A float32 array of shape (dim,) or (n, dim) that Celery can store and pass on.

    For numpy it is an ordinary array, and arithmetic on it gives ordinary arrays. It has a JSON form,
    so that a result can be an argument of a chain, chord or callback. Its ``repr`` is short, because
    Celery takes the ``repr`` of each result (2 ms for 384 printed floats), and to keep vectors out of
    logs. ``print(vectors)`` shows the numbers.
    """

    __slots__ = ()

    @classmethod
    def of(cls, array: Floats) -> Vectors:
        """Return ``array`` as vectors; the memory is shared if the array is contiguous float32."""
        return np.ascontiguousarray(array, dtype="<f4").view(cls)

    def __json__(self) -> dict[str, Any]:
        # kombu calls this before it looks for a registered type, so no other codec of ndarray is used.
        if self.dtype != np.float32:
            raise TypeError(f"vectors are float32; an array of {self.dtype} has no JSON form")
        data = base64.b64encode(np.ascontiguousarray(self, dtype="<f4").data).decode("ascii")
        return _typed(VECTORS_TYPE, {"v": VERSION, "shape": list(self.shape), "data": data})

    def __array_wrap__(self, array: Any, context: Any = None, return_scalar: bool = False, /) -> Any:
        if array is self:  # arithmetic in place, such as v /= n
            return self
        return array[()] if return_scalar else np.asarray(array)

    def __repr__(self) -> str:
        if self.dtype != np.float32:  # such as the indices that argsort() returns
            return repr(np.asarray(self))
        return f"<Vectors {'x'.join(map(str, self.shape))} float32>"


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Embeddings:
    """The answer of ``embed(..., details=True)``.

    Attributes:
        vectors: shape (dim,) for one text, (n, dim) for a list.
        space: the name of the embedding space. Vectors of two spaces must not be compared.
        model: the model's name as the fleet was given it.
        tokens: the tokens of each text that were embedded, special tokens and prompt included.
        chunks: the chunks of each text; 1 for a text within the threshold.
        truncated: whether each text was cut off at the model's window, as ``truncate=True`` asks.
        spans: for each text, where each of its chunks begins and ends in it, in characters.
        weights: for each text, how much the vector of each chunk counts; they add up to 1.
        chunk_vectors: with ``chunk_vectors=True`` the vectors of all chunks, in the order of ``spans``:
            shape (sum(chunks), dim); else None.
        device: the device that computed them, or several, separated by commas.
        queue_s: seconds the texts waited on the device while none of them was computed.
        compute_s: seconds that the batches with these texts took.
    """

    vectors: Vectors
    space: str
    model: str
    tokens: tuple[int, ...]
    chunks: tuple[int, ...]
    truncated: tuple[bool, ...]
    spans: tuple[tuple[tuple[int, int], ...], ...]
    weights: tuple[tuple[float, ...], ...]
    chunk_vectors: Vectors | None
    device: str
    queue_s: float
    compute_s: float

    def __repr__(self) -> str:
        # Short for the reasons of Vectors: a book has thousands of spans.
        return f"<Embeddings {len(self.tokens)} texts, {sum(self.chunks)} chunks, {self.space}>"

    def __json__(self) -> dict[str, Any]:
        value = {name: getattr(self, name) for name in self.__slots__}
        return _typed(EMBEDDINGS_TYPE, {"v": EMBEDDINGS_VERSION, **value})


def finish(rows: Floats, *, dimensions: int | None, normalize: bool) -> Floats:
    """Cut rows of shape (n, width) to ``dimensions`` and bring each to unit length.

    A Matryoshka width is cut before the norm is taken. A row of zeros stays zero, as in
    sentence-transformers.

    Args:
        rows: float32.
        dimensions: None: all.
        normalize: whether rows are brought to unit length.
    """
    if dimensions is not None:
        rows = rows[:, :dimensions]
    if not normalize:
        return rows
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    finished: Floats = rows / np.maximum(norms, np.float32(1e-12))
    return finished


def _typed(name: str, value: dict[str, Any]) -> dict[str, Any]:
    return {"__type__": name, "__value__": value}


def _versioned(name: str, value: Any, version: int) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CorruptResultError(f"{name} is not an object")
    if value.get("v") != version:
        raise UnsupportedVersionError(name, str(value.get("v"))[:20], version)
    return value


def _vectors_from_json(value: Any) -> Vectors:
    record = _versioned(VECTORS_TYPE, value, VERSION)
    shape, data = record.get("shape"), record.get("data")
    if (
        not isinstance(shape, list)
        or len(shape) not in (1, 2)
        or not all(type(n) is int and 0 <= n <= MOST for n in shape)
    ):
        raise CorruptResultError("shape must be one or two whole numbers of a sensible size")
    try:
        raw = base64.b64decode(str(data), validate=True)
    except (binascii.Error, ValueError):
        raise CorruptResultError("data is not base64") from None
    if len(raw) != 4 * math.prod(shape):
        raise CorruptResultError(f"{len(raw)} bytes do not make a float32 array of shape {shape}")
    # A copy, because arrays of frombuffer are read-only and callers may normalise in place.
    return np.frombuffer(raw, dtype="<f4").reshape(shape).copy().view(Vectors)


def _embeddings_from_json(value: Any) -> Embeddings:
    record = dict(_versioned(EMBEDDINGS_TYPE, value, EMBEDDINGS_VERSION))
    del record["v"]
    try:
        for name in ("tokens", "chunks", "truncated"):
            record[name] = tuple(record[name])
        record["spans"] = tuple(tuple((start, end) for start, end in spans) for spans in record["spans"])
        record["weights"] = tuple(tuple(weights) for weights in record["weights"])
        found = Embeddings(**record)
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptResultError(f"{EMBEDDINGS_TYPE}: {error}") from None
    if not isinstance(found.vectors, Vectors) or not isinstance(found.chunk_vectors, Vectors | None):
        raise CorruptResultError(f"{EMBEDDINGS_TYPE} holds no vectors")
    return found


def register() -> None:
    """Register both types with kombu's JSON; doing so again changes nothing."""
    kombu_json.register_type(
        Vectors, VECTORS_TYPE, lambda v: v.__json__()["__value__"], _vectors_from_json
    )
    kombu_json.register_type(
        Embeddings, EMBEDDINGS_TYPE, lambda e: e.__json__()["__value__"], _embeddings_from_json
    )
