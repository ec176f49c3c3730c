"""Projections of the teacher's vectors to the student's width, and back.

A projection is a matrix ``P`` of shape (width, d) with orthonormal rows, so its transpose maps back.
Vectors are rows; those of a teacher have unit length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from sutra_tasks.errors import InvalidOptionError
from sutra_tasks.vectors import finish

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sutra_tasks.vectors import Floats

__all__ = ["ceiling", "jl", "lift", "project", "svd"]

BLOCK_ROWS: Final = 8_192
"""Rows converted to float64 at a time: 25 MB at a width of 384."""


def svd(vectors: Floats, width: int) -> Floats:
    """Return the projection that preserves most of ``vectors``: their leading right singular vectors.

    Of all projections of this width it has the largest mean squared cosine between a vector and its
    projection mapped back (Eckart and Young, 1936). The vectors are not centred, because cosines are
    angles at the origin. The same vectors in any order give the same matrix up to rounding: the sign of
    each row makes its largest element positive.

    Args:
        vectors: float32 unit rows, shape (n, d), n at least 1.
        width: of the narrower space, 1 to d. Beyond the rank of ``vectors`` the further rows are
            arbitrary, orthonormal to the others.

    Returns:
        float32, shape (width, d), rows in descending order of their singular values.

    Raises:
        InvalidOptionError: ``output_dim`` is over d, or under 1.
        ValueError: there is no vector, or one is not finite.
    """
    rows, input_width = vectors.shape
    _check(width, input_width)
    gram = np.zeros((input_width, input_width))
    for start in range(0, rows, BLOCK_ROWS):
        block = vectors[start : start + BLOCK_ROWS].astype(np.float64)
        gram += block.T @ block
    if not rows or not np.isfinite(gram).all():
        raise ValueError("a projection needs vectors, and each of them finite")
    # In ascending order of the eigenvalues, which are the squared singular values.
    _, columns = np.linalg.eigh(gram)
    leading = columns[:, ::-1][:, :width].T
    largest = np.take_along_axis(leading, np.argmax(np.abs(leading), axis=1)[:, None], axis=1)
    return _stored(leading * np.copysign(1.0, largest))


def jl(input_width: int, width: int, rng: np.random.Generator) -> Floats:
    """Return a random projection by the Johnson-Lindenstrauss lemma, its rows orthonormalised.

    The specification's Gaussian matrix with variance ``1 / width``, then QR with signs that make every
    orthonormal matrix equally likely (Mezzadri, 2007). It does not depend on the data, and scales
    distances by about ``sqrt(width / input_width)``, more evenly the larger ``width``.

    Args:
        input_width: of the vectors to project.
        width: of the narrower space, 1 to ``input_width``.
        rng: draws the matrix.

    Returns:
        float32, shape (width, input_width).

    Raises:
        InvalidOptionError: ``output_dim`` is over ``input_width``, or under 1.
    """
    _check(width, input_width)
    gaussian = rng.standard_normal((input_width, width)) * np.sqrt(1.0 / width)
    columns, triangle = np.linalg.qr(gaussian)
    return _stored((columns * np.copysign(1.0, np.diag(triangle))).T)


def project(matrix: Floats, vectors: Floats) -> Floats:
    """Return ``normalize(P t)`` of each row t: float32 unit rows, shape (n, width).

    Args:
        matrix: the projection, shape (width, d).
        vectors: shape (n, d). A row that the projection maps to 0 stays 0.
    """
    return _unit(vectors.astype(np.float32, copy=False) @ matrix.T)


def lift(matrix: Floats, vectors: Floats) -> Floats:
    """Return ``normalize(P' s)`` of each row s, mapped back: float32 unit rows, shape (n, d).

    Args:
        matrix: the projection, shape (width, d).
        vectors: shape (n, width).
    """
    return _unit(vectors.astype(np.float32, copy=False) @ matrix)


def ceiling(matrix: Floats, vectors: Floats) -> float:
    """Return the mean cosine between each row and its projection mapped back, ``P' P t``.

    No student of this projection has a higher mean lifted cosine: lifted vectors lie in the row space of
    ``P``, and ``P' P t`` is the direction there that is nearest to t.

    Args:
        matrix: the projection, orthonormal rows, shape (width, d).
        vectors: float32 unit rows, shape (n, d), n at least 1.
    """
    # cos(t, P'Pt) = |Pt| for a unit t and orthonormal rows: no vector of full width is needed.
    kept = vectors.astype(np.float32, copy=False) @ matrix.T
    return float(np.mean(np.linalg.norm(kept, axis=1), dtype=np.float64))


def _unit(rows: Floats) -> Floats:
    return finish(rows, dimensions=None, normalize=True)


def _stored(matrix: NDArray[np.float64]) -> Floats:
    return np.ascontiguousarray(matrix, dtype=np.float32)


def _check(width: int, input_width: int) -> None:
    if not 0 < width <= input_width:
        raise InvalidOptionError(
            "output_dim", str(width), f"1 to {input_width}, the width of the teacher's vectors"
        )
