"""How much each input column of a LoRA module matters (docs/method.md, column order).

The score is Wanda's, activation norm times weight magnitude, summed over the LoRA rows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shelora.errors import NonFiniteValue, ShapeMismatch, ValueOutOfRange


def check_scores(kind: str, scores: NDArray[np.float64], size: int | None = None) -> None:
    """Refuse anything but a vector of finite numbers >= 0.

    Args:
        kind: what the numbers are, used in the message.
        scores: float[n].
        size: the n that is expected; None takes any.

    Raises:
        ShapeMismatch: not a vector, or of another length.
        NonFiniteValue: NaN or infinity.
        ValueOutOfRange: a negative number.
    """
    if scores.ndim != 1 or (size is not None and scores.size != size):
        raise ShapeMismatch(
            f"expected {kind} of shape ({'n' if size is None else size},), got {scores.shape}",
            hint="give one number per input column of the module",
        )
    if not np.isfinite(scores).all():
        raise NonFiniteValue(
            f"expected finite {kind}, got NaN or infinity in {np.count_nonzero(~np.isfinite(scores))} places",
            hint="check the calibration batches and the learning rate",
        )
    if (scores < 0).any():
        raise ValueOutOfRange(
            f"expected {kind} >= 0, got {float(scores.min())}",
            hint="norms and their products are never negative",
        )


def column_sensitivity(activation_norms: NDArray[np.float64], a: NDArray[np.float64]) -> NDArray[np.float64]:
    """Score every input column by activation norm times the column's absolute sum in A.

    Args:
        activation_norms: float[n], the 2-norm of each input activation over the calibration batches, >= 0.
        a: float[r, n], the LoRA A factor.

    Returns:
        float64[n] with mean 1 (to 1e-12), or all ones when every score is 0.

    Raises:
        ShapeMismatch: `a` is not a matrix with n columns.
        NonFiniteValue: NaN or infinity in either argument.
        ValueOutOfRange: a negative norm.
    """
    norms = np.asarray(activation_norms, dtype=np.float64)
    rows = np.asarray(a, dtype=np.float64)
    check_scores("activation norms", norms)
    if rows.ndim != 2 or rows.shape[1] != norms.size:
        raise ShapeMismatch(
            f"expected A of shape (r, {norms.size}), got {rows.shape}",
            hint="activation norms and A must come from the same module",
        )
    magnitudes = np.abs(rows)
    if not np.isfinite(magnitudes).all():
        raise NonFiniteValue("expected finite entries in A, got NaN or infinity", hint="check the learning rate")
    scores = _scaled_to_unit_maximum(norms) * _scaled_to_unit_maximum(magnitudes).sum(axis=0)
    scores = _scaled_to_unit_maximum(scores)
    total = float(scores.sum())
    return scores * (scores.size / total) if total > 0 else np.ones_like(scores)


def order_columns(scores: NDArray[np.float64]) -> NDArray[np.int64]:
    """Column indices from the highest score to the lowest; equal scores by index.

    Args:
        scores: float[n], finite and >= 0.

    Returns:
        int64[n], a permutation.

    Raises:
        ShapeMismatch, NonFiniteValue, ValueOutOfRange: as `check_scores`.
    """
    check_scores("column scores", scores)
    return np.argsort(-scores, kind="stable").astype(np.int64, copy=False)


def _scaled_to_unit_maximum(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Divide by the largest entry, so that products and sums of huge entries cannot overflow."""
    largest = float(values.max(initial=0.0))
    return values / largest if largest > 0 else values
