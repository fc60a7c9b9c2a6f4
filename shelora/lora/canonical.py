"""Canonical form of a LoRA update: all the energy in the left factor, orthonormal rows in the right one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shelora.errors import RankMismatch
from shelora.lora.arrays import Array, check_matrix, check_positive, check_rank, row_signs
from shelora.lora.decomposition import decompose


@dataclass(frozen=True, eq=False)
class Factors:
    """One module's update as left @ right.

    Attributes:
        left: float64[m, r]; its columns are orthogonal, in order of falling norm, when made by `canonical`.
        right: float64[r, n]; orthonormal rows, hence every |entry| <= 1, when made by `canonical`.

    Raises:
        RankMismatch: the inner dimensions differ.
    """

    left: Array
    right: Array

    def __post_init__(self) -> None:
        """Check that the two factors multiply."""
        if self.left.shape[-1] != self.right.shape[0]:
            raise RankMismatch(
                f"expected left[m, r] and right[r, n] of one rank, got {self.left.shape} and {self.right.shape}"
            )

    @property
    def rank(self) -> int:
        """The common inner dimension r."""
        return int(self.right.shape[0])


def canonical(b: npt.ArrayLike, a: npt.ArrayLike, scaling: float) -> Factors:
    """Rewrite scaling * b @ a as left @ right with orthonormal right rows, without forming the m x n product.

    Thin QR of b and of a's transpose, then the SVD of the r x r core in between. Works for any b and a, zero and rank
    deficient ones included: directions without energy get a zero left column and still a unit right row.

    Args:
        b: float[m, r], LoRA's B.
        a: float[r, n], LoRA's A, r <= min(m, n).
        scaling: LoRA scaling, positive.

    Returns:
        Factors(left float64[m, r], right float64[r, n]); the product equals the input's within
        1e-12 * scaling * |b|_F * |a|_F in the Frobenius norm, right @ right.T is the identity within 1e-12. Signs are
        fixed: the largest entry of each right row is positive.

    Raises:
        ShapeMismatch: not matrices, or inner dimensions that differ.
        RankMismatch: r is 0 or larger than min(m, n).
        NonFiniteValue: NaN or infinity in the input.
        ValueOutOfRange: entries too large, or a scaling that is not positive.

    Source: docs/method.md section 2.
    """
    b_matrix = check_matrix("b", b)
    rows, rank = b_matrix.shape
    a_matrix = check_matrix("a", a, rows=rank)
    factor = check_positive("scaling", scaling)
    check_rank(rank, min(rows, a_matrix.shape[1]))
    return compress(b_matrix, a_matrix, factor)


def compress(b: Array, a: Array, factor: float) -> Factors:
    """As `canonical`, for checked arrays of any inner dimension p.

    Args:
        b: float64[m, p].
        a: float64[p, n].
        factor: multiplies the product.

    Returns:
        Factors of rank min(m, n, p).
    """
    b_basis, b_core = np.linalg.qr(b)
    a_basis, a_core = np.linalg.qr(a.T)
    inner, energy, outer = decompose(factor * (b_core @ a_core.T))
    right = outer @ a_basis.T
    signs = row_signs(right)
    return Factors(left=b_basis @ (inner * (energy * signs)), right=right * signs[:, None])
