"""The average in two parts: plain columns summed in the clear, encrypted columns summed under encryption.

Columns are in wire order everywhere here; a member's first k columns are encrypted, the rest are plain. A column may be
encrypted for one member and plain for another: the two parts add up.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from shelora.errors import ShapeMismatch
from shelora.lora.arrays import Array, check_entries, check_matrix, check_positive, check_same_length
from shelora.lora.canonical import Factors


def project(basis: npt.ArrayLike, left: npt.ArrayLike) -> Array:
    """Coordinates of a left factor in the cohort's basis.

    Args:
        basis: float[m, s], orthonormal columns.
        left: float[m, r].

    Returns:
        float64[s, r], basis.T @ left.

    Raises:
        ShapeMismatch: not matrices, or of different height.
        NonFiniteValue: NaN or infinity in the input.
        ValueOutOfRange: entries too large.

    Source: docs/method.md section 5.
    """
    basis_matrix = check_matrix("basis", basis)
    return basis_matrix.T @ check_matrix("left factor", left, rows=basis_matrix.shape[0])


def plain_part(projection: npt.ArrayLike, right_plain: npt.ArrayLike, weight: float, n: int) -> Array:
    """One member's weighted contribution from its plain columns.

    Args:
        projection: float[s, r] from `project`.
        right_plain: float[r, n - k], the right factor's columns k and on, in wire order; k may be 0 or n.
        weight: the member's weight, positive.
        n: input width of the module.

    Returns:
        float64[s, n]; the first k columns are zero.

    Raises:
        ShapeMismatch: inner dimensions differ, or more than n columns.
        NonFiniteValue: NaN or infinity in the input.
        ValueOutOfRange: entries too large, or a weight that is not positive.

    Source: docs/method.md section 5.
    """
    coordinates = check_matrix("projection", projection)
    plain = check_matrix("plain columns", right_plain, rows=coordinates.shape[1])
    hidden = n - plain.shape[1]
    if hidden < 0:
        raise ShapeMismatch(f"plain columns: expected at most {n} columns, got {plain.shape[1]}")
    part = np.zeros((coordinates.shape[0], n))
    np.matmul(check_positive("weight", weight) * coordinates, plain, out=part[:, hidden:])
    return part


def cipher_part(projection: npt.ArrayLike, right_encrypted: npt.ArrayLike, weight: float) -> Array:
    """What one member encrypts: its weighted contribution to its first k columns.

    Args:
        projection: float[s, r] as the aggregator answered it.
        right_encrypted: float[r, k], the right factor's first k columns in wire order.
        weight: the member's weight, positive.

    Returns:
        float64[s, k]; every |entry| is at most weight times the left factor's largest singular value.

    Raises:
        ShapeMismatch: not matrices, or inner dimensions that differ.
        NonFiniteValue: NaN or infinity in the input.
        ValueOutOfRange: entries too large, or a weight that is not positive.

    Source: docs/method.md section 5.
    """
    coordinates = check_matrix("projection", projection)
    hidden = check_matrix("encrypted columns", right_encrypted, rows=coordinates.shape[1])
    return (check_positive("weight", weight) * coordinates) @ hidden


def average(plain: npt.ArrayLike, decrypted: npt.ArrayLike, total_weight: float) -> Array:
    """Add the two summed parts and divide by the weight that counts.

    Args:
        plain: float[s, n], sum of the members' `plain_part`.
        decrypted: float[s, k_max], sum of the members' `cipher_part` each padded to the largest k; k_max <= n.
        total_weight: sum W of the weights of the members in both sums, positive.

    Returns:
        float64[s, n] core of the average, in wire order: basis @ core is the averaged update.

    Raises:
        ShapeMismatch: different heights, or more decrypted than plain columns.
        NonFiniteValue: NaN or infinity in the input.
        ValueOutOfRange: entries too large, or a weight that is not positive.

    Source: docs/method.md section 5.
    """
    core = check_matrix("plain part", plain).copy()
    opened = check_matrix("decrypted part", decrypted, rows=core.shape[0])
    if opened.shape[1] > core.shape[1]:
        raise ShapeMismatch(f"decrypted part: expected at most {core.shape[1]} columns, got {opened.shape[1]}")
    core[:, : opened.shape[1]] += opened
    core /= check_positive("total weight", total_weight)
    return core


def dense_average(weighted_sum: npt.ArrayLike, total_weight: float) -> Array:
    """Average of a tensor trained outside the LoRA pairs.

    Args:
        weighted_sum: float[...], sum of weight times tensor over the members that count.
        total_weight: sum W of those weights, positive.

    Returns:
        float64[...] of the same shape.

    Raises:
        NonFiniteValue: NaN or infinity in the input.
        ValueOutOfRange: entries too large, or a weight that is not positive.

    Source: docs/method.md section 5.
    """
    return np.divide(check_entries("weighted sum", weighted_sum), check_positive("total weight", total_weight))


def plaintext_average(factors: Sequence[Factors], weights: Sequence[float]) -> Array:
    """The average the method computes, formed openly as an m x n matrix: the reference for tests and demonstrations.

    Args:
        factors: one per member, all of one m and n, ranks may differ.
        weights: one positive weight per member; normalised by their sum.

    Returns:
        float64[m, n].

    Raises:
        ShapeMismatch: no members, different lengths, or modules of different shapes.
        NonFiniteValue: NaN or infinity in the input.
        ValueOutOfRange: entries too large, or a weight that is not positive.

    Source: docs/method.md section 2.
    """
    check_same_length("factors", factors, "weights", weights)
    shape = factors[0].left.shape[0], factors[0].right.shape[1]
    total = np.zeros(shape)
    for member, weight in zip(factors, weights, strict=True):
        left = check_matrix("left factor", member.left, rows=shape[0])
        right = check_matrix("right factor", member.right, columns=shape[1])
        total += (check_positive("weight", weight) * left) @ right
    return np.divide(total, sum(weights))
