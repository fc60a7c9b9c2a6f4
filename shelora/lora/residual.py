"""Trained rank and sent rank: what an adapter of the trained rank leaves of an average, and the two joined again."""

from __future__ import annotations

import numpy as np

from shelora.lora.arrays import Array, check_matrix, check_positive, check_rank
from shelora.lora.canonical import Factors, compress
from shelora.lora.reparameterize import Adapter, truncate


def split(adapter: Adapter, rank: int, scaling: float) -> tuple[Adapter, Factors]:
    """Part an adapter of the sent rank, as `reparameterize` fits it, into an adapter to train and the rest to keep.

    Args:
        adapter: strongest direction first; directions without a column of b hold a fresh row of a.
        rank: the trained rank, at most the adapter's.
        scaling: the adapter's, positive.

    Returns:
        The first `rank` directions, and the residual left float64[m, p] @ right float64[p, n] of the p directions
        behind them that are there: scaling * fit.b @ fit.a + left @ right is the adapter's update.

    Raises:
        RankMismatch: the adapter has fewer directions, or rank is below 1.
        ShapeMismatch: not matrices.
        NonFiniteValue: NaN or infinity in the input.
        ValueOutOfRange: entries too large, or a scaling that is not positive.

    Source: docs/method.md section 5.
    """
    factor = check_positive("scaling", scaling)
    b, a = check_matrix("b", adapter.b), check_matrix("a", adapter.a)
    fit = truncate(adapter, rank)
    there = rank + np.flatnonzero(np.any(b[:, rank:] != 0.0, axis=0))
    return fit, Factors(left=factor * b[:, there], right=a[there])


def join(adapter: Adapter, scaling: float, residual: Factors | None, rank: int) -> Factors:
    """Canonical factors of the sent rank for a trained adapter and the residual kept beside it.

    QR decompositions of the two factors' columns side by side and an SVD of the core in between; no m x n matrix.

    Args:
        adapter: the trained weights.
        scaling: their LoRA scaling, positive.
        residual: left float[m, p], right float[p, n] of any rank p; None stands for zero.
        rank: the sent rank t, 1 <= t <= min(m, n).

    Returns:
        Factors of rank t, left @ right = scaling * b @ a + residual where that has rank t or less, else its best fit of
        rank t. Left columns are orthogonal, in order of falling norm; right rows are orthonormal. Where adapter and
        residual have fewer than t directions together, the missing ones are zero on both sides: made-up unit rows would
        depend on columns that the agent encrypts.

    Raises:
        RankMismatch: a sent rank that is not possible.
        ShapeMismatch: matrices that do not fit together.
        NonFiniteValue: NaN or infinity in the input.
        ValueOutOfRange: entries too large, or a scaling that is not positive.

    Source: docs/method.md section 5.
    """
    b, a = check_matrix("b", adapter.b), check_matrix("a", adapter.a)
    check_rank(rank, min(b.shape[0], a.shape[1]))
    lefts, rights = [check_positive("scaling", scaling) * b], [a]
    if residual is not None:
        lefts.append(check_matrix("residual's left factor", residual.left, rows=b.shape[0]))
        rights.append(check_matrix("residual's right factor", residual.right, columns=a.shape[1]))
    whole = compress(np.concatenate(lefts, axis=1), np.concatenate(rights), 1.0)
    return Factors(left=_resized(whole.left.T, rank).T, right=_resized(whole.right, rank))


def _resized(rows: Array, count: int) -> Array:
    """The first rows, zeros where there are too few."""
    sized = np.zeros((count, rows.shape[1]))
    sized[: min(count, rows.shape[0])] = rows[:count]
    return sized
