"""Thin singular value decomposition that does not give up on a finite matrix.

LAPACK's divide and conquer now and then reports that it did not converge, for finite and well-scaled matrices, where
the same matrix transposed or reduced to a triangle decomposes at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from shelora.lora.arrays import Array

Decomposition = tuple[Array, Array, Array]
"""(left float64[m, k], energy float64[k], right float64[k, n]), k = min(m, n)."""


def decompose(matrix: Array) -> Decomposition:
    """Thin SVD: matrix = (left * energy) @ right, energy falling.

    The matrix itself first, then the triangle of its QR decomposition, then its transpose.

    Args:
        matrix: float64[m, n], finite.

    Returns:
        left float64[m, k] with orthonormal columns, energy float64[k], right float64[k, n] with orthonormal rows;
        k = min(m, n).

    Raises:
        numpy.linalg.LinAlgError: none of the ways converges.

    Source: docs/method.md section 2.
    """
    for way in _WAYS[:-1]:
        try:
            return way(matrix)
        except np.linalg.LinAlgError:
            continue
    return _WAYS[-1](matrix)


def _directly(matrix: Array) -> Decomposition:
    left, energy, right = np.linalg.svd(matrix, full_matrices=False)
    return left, energy, right


def _by_triangle(matrix: Array) -> Decomposition:
    basis, triangle = np.linalg.qr(matrix)
    left, energy, right = _directly(triangle)
    return basis @ left, energy, right


def _by_transpose(matrix: Array) -> Decomposition:
    left, energy, right = _directly(matrix.T)
    return right.T, energy, left.T


_WAYS: Final[tuple[Callable[[Array], Decomposition], ...]] = (_directly, _by_triangle, _by_transpose)
