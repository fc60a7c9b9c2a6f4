"""The cohort's common output basis: top left singular vectors of the weighted left factors side by side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from shelora.errors import RankMismatch, ShapeMismatch, ValueOutOfRange
from shelora.lora.arrays import Array, check_matrix, check_positive, check_rank, check_same_length, row_signs
from shelora.lora.decomposition import decompose


def basis_rows(m: int, ranks: Sequence[int], cap: int) -> int:
    """Number of basis columns s (rows of every projected matrix) of one module.

    Args:
        m: output width of the module.
        ranks: ranks of the cohort's members, each 1 <= r <= m.
        cap: largest number of basis columns, at least 1.

    Returns:
        min(sum of ranks, cap, m).

    Raises:
        RankMismatch: no ranks, or a rank that is not possible.
        ValueOutOfRange: cap below 1.

    Source: docs/method.md section 5.
    """
    if not ranks:
        raise RankMismatch("expected the rank of at least one cohort member, got none")
    return min(sum(check_rank(rank, m) for rank in ranks), _check_cap(cap), m)


def basis(lefts: Sequence[npt.ArrayLike], weights: Sequence[float], cap: int) -> Array:
    """Top left singular vectors of [w_1 L_1, w_2 L_2, ...].

    Args:
        lefts: one float[m, r_i] per member, 1 <= r_i <= m.
        weights: one positive weight per member.
        cap: largest number of columns, at least 1.

    Returns:
        float64[m, s], s = min(sum r_i, cap, m); orthonormal columns (within 1e-12), largest entry of each positive.
        With sum r_i <= cap every L_i lies in their span; otherwise they lose the least energy that s directions can.

    Raises:
        ShapeMismatch: no factors, different lengths, or factors of different height.
        RankMismatch: a factor with more columns than rows, or none.
        NonFiniteValue: NaN or infinity in the input.
        ValueOutOfRange: entries too large, a weight that is not positive, or cap below 1.

    Source: docs/method.md section 5.
    """
    check_same_length("left factors", lefts, "weights", weights)
    limit = _check_cap(cap)
    first = check_matrix("left factor 0", lefts[0])
    rows = first.shape[0]
    scaled = [_weigh(left, weight, rows) for left, weight in zip(lefts, weights, strict=True)]
    return _leading(np.concatenate(scaled, axis=1), limit)


class BasisSketch:
    """The same basis from factors that come one by one, in memory that does not grow with their number.

    Holds at most 2 * cap + r weighted columns: new ones are appended, and above 2 * cap the whole is replaced by its
    `cap` strongest directions times their singular values. While the sum of ranks is at most 2 * cap nothing is ever
    dropped and `basis()` spans what the batch spans.

    Source: docs/method.md section 5.
    """

    def __init__(self, rows: int, cap: int) -> None:
        """Start empty.

        Args:
            rows: output width m of the module.
            cap: largest number of basis columns, at least 1.

        Raises:
            ShapeMismatch: rows below 1.
            ValueOutOfRange: cap below 1.
        """
        if rows < 1:
            raise ShapeMismatch(f"expected a module of at least 1 row, got {rows}")
        self._rows = rows
        self._cap = _check_cap(cap)
        self._columns: Array = np.zeros((rows, 0))
        self._rank_sum = 0

    @property
    def rows(self) -> int:
        """Output width m."""
        return self._rows

    @property
    def cap(self) -> int:
        """Largest number of basis columns."""
        return self._cap

    @property
    def rank_sum(self) -> int:
        """Sum of the ranks added so far, merged sketches included."""
        return self._rank_sum

    def add(self, left: npt.ArrayLike, weight: float) -> None:
        """Add one member's left factor.

        Args:
            left: float[m, r], 1 <= r <= m.
            weight: positive weight.

        Raises:
            ShapeMismatch: another height than the sketch.
            RankMismatch: more columns than rows, or none.
            NonFiniteValue: NaN or infinity in the input.
            ValueOutOfRange: entries too large, or a weight that is not positive.
        """
        scaled = _weigh(left, weight, self._rows)
        self._append(scaled, scaled.shape[1])

    def merge(self, other: BasisSketch) -> BasisSketch:
        """Add everything another sketch holds; the other stays as it is.

        Merging is associative and commutative in the span while the sum of ranks is at most 2 * cap. Beyond
        that the weakest directions depend on the order: docs/method.md section 8 says how much that costs.

        Args:
            other: a sketch of the same rows and cap.

        Returns:
            This sketch.

        Raises:
            ShapeMismatch: other rows or another cap.
        """
        if (other.rows, other.cap) != (self._rows, self._cap):
            raise ShapeMismatch(
                f"expected a sketch of {self._rows} rows and cap {self._cap}, got {other.rows} rows and cap {other.cap}"
            )
        self._append(other._columns, other.rank_sum)
        return self

    def basis(self) -> Array:
        """The basis of everything added so far.

        Returns:
            float64[m, s], s = min(rank_sum, cap, m), as `basis` returns it.

        Raises:
            ShapeMismatch: nothing was added.
        """
        if not self._rank_sum:
            raise ShapeMismatch("expected at least one left factor before asking for a basis, got none")
        return _leading(self._columns, self._cap)

    def _append(self, columns: Array, rank_sum: int) -> None:
        self._columns = np.concatenate([self._columns, columns], axis=1)
        self._rank_sum += rank_sum
        if self._columns.shape[1] > 2 * self._cap:
            directions, energy, _ = decompose(self._columns)
            self._columns = (directions * energy)[:, : self._cap]


def _check_cap(cap: int) -> int:
    if cap < 1:
        raise ValueOutOfRange(
            f"expected a basis cap of at least 1, got {cap}", hint="use 2 to 4 times the largest rank"
        )
    return cap


def _weigh(left: npt.ArrayLike, weight: float, rows: int) -> Array:
    matrix = check_matrix("left factor", left, rows=rows)
    check_rank(matrix.shape[1], rows)
    return matrix * check_positive("weight", weight)


def _leading(columns: Array, cap: int) -> Array:
    directions = decompose(columns)[0][:, :cap]
    return np.ascontiguousarray(directions * row_signs(directions.T))
