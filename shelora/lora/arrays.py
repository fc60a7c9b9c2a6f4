"""Checked arrays and scalars: what every function of this package accepts.

All arithmetic is float64. Entries and scalars beyond `LARGEST_ENTRY` are refused at the door: no product formed in this
package can then overflow, so a decomposition never meets an infinity. Every float32 number is within the bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from shelora.errors import NonFiniteValue, RankMismatch, ShapeMismatch, ValueOutOfRange

Array: TypeAlias = npt.NDArray[np.float64]

LARGEST_ENTRY = 1e60
"""Largest absolute value of an entry, and largest scalar; scalars are also at least its reciprocal."""


def check_entries(name: str, value: npt.ArrayLike) -> Array:
    """Convert to float64 and check every entry.

    Args:
        name: what the array is, for the error message.
        value: real array of any shape.

    Returns:
        float64 array of the same shape; the same object when it already is one.

    Raises:
        NonFiniteValue: an entry is NaN or infinite.
        ValueOutOfRange: an entry is larger than `LARGEST_ENTRY` in absolute value.
    """
    array: Array = np.asarray(value, dtype=np.float64)
    largest = float(np.max(np.abs(array), initial=0.0))
    if not math.isfinite(largest):
        raise NonFiniteValue(
            f"{name}: expected finite entries, got NaN or infinity",
            hint="lower the learning rate or check the training data",
        )
    if largest > LARGEST_ENTRY:
        raise ValueOutOfRange(
            f"{name}: expected entries of at most {LARGEST_ENTRY:g} in absolute value, got {largest:g}",
            hint="the training diverged: lower the learning rate",
        )
    return array


def check_matrix(name: str, value: npt.ArrayLike, *, rows: int | None = None, columns: int | None = None) -> Array:
    """Convert to a float64 matrix and check its shape and entries.

    Args:
        name: what the matrix is, for the error message.
        value: real matrix.
        rows: required number of rows; any when None.
        columns: required number of columns; any when None.

    Returns:
        float64[rows, columns].

    Raises:
        ShapeMismatch: not a matrix, or another shape than required.
        NonFiniteValue: an entry is NaN or infinite.
        ValueOutOfRange: an entry is larger than `LARGEST_ENTRY` in absolute value.
    """
    array = check_entries(name, value)
    wanted = (rows, columns)
    if array.ndim != 2 or any(want not in (None, got) for want, got in zip(wanted, array.shape, strict=True)):
        expected = ", ".join("any" if want is None else str(want) for want in wanted)
        raise ShapeMismatch(
            f"{name}: expected a matrix of shape ({expected}), got {array.shape}",
            hint="check that all parts belong to the same module, cohort and round",
        )
    return array


def check_positive(name: str, value: float) -> float:
    """Check that a scalar is finite and within [1 / LARGEST_ENTRY, LARGEST_ENTRY].

    Args:
        name: what the number is, for the error message.
        value: the number.

    Returns:
        The number as a float.

    Raises:
        NonFiniteValue: NaN or infinity.
        ValueOutOfRange: zero, negative, too small or too large.
    """
    number = float(value)
    if not math.isfinite(number):
        raise NonFiniteValue(f"{name}: expected a finite number, got {number}")
    if not 1.0 / LARGEST_ENTRY <= number <= LARGEST_ENTRY:
        raise ValueOutOfRange(
            f"{name}: expected a number between {1.0 / LARGEST_ENTRY:g} and {LARGEST_ENTRY:g}, got {number:g}"
        )
    return number


def check_rank(rank: int, limit: int) -> int:
    """Check that 1 <= rank <= limit.

    Args:
        rank: a LoRA rank.
        limit: the largest rank possible, min(m, n) of the module.

    Returns:
        The rank.

    Raises:
        RankMismatch: the rank is not possible.
    """
    if not 1 <= rank <= limit:
        raise RankMismatch(
            f"expected a LoRA rank between 1 and {limit}, got {rank}",
            hint="choose a rank of at most the smaller dimension of the module",
        )
    return rank


def check_same_length(name: str, items: Sequence[Any], other_name: str, others: Sequence[Any]) -> None:
    """Check that two sequences pair up and are not empty.

    Args:
        name: what the first sequence holds.
        items: the first sequence.
        other_name: what the second sequence holds.
        others: the second sequence.

    Raises:
        ShapeMismatch: different lengths, or nothing in them.
    """
    if len(items) != len(others) or not items:
        raise ShapeMismatch(
            f"expected as many {name} as {other_name} and at least one, got {len(items)} and {len(others)}"
        )


def row_signs(matrix: Array) -> Array:
    """Signs that make the first largest entry of each row positive.

    A pair of singular vectors is defined up to a common sign; multiplying both by these makes one choice of the two.

    Args:
        matrix: float64[r, n], n >= 1.

    Returns:
        float64[r] of 1.0 and -1.0 (1.0 for a row of zeros).
    """
    peaks = np.take_along_axis(matrix, np.argmax(np.abs(matrix), axis=1)[:, None], axis=1)[:, 0]
    return np.where(peaks < 0.0, -1.0, 1.0)
