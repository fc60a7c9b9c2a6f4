"""From the published average back to an adapter of an agent's own rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from shelora.errors import RankMismatch, ShapeMismatch
from shelora.lora.arrays import Array, check_matrix, check_positive, check_rank, row_signs
from shelora.lora.decomposition import decompose

MISSING_DIRECTION = 1e-12
"""Singular values up to this share of the largest count as missing."""

FreshRows: TypeAlias = npt.ArrayLike | Callable[[], npt.ArrayLike]
"""Rows of A for directions that an update does not have, or what draws them."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """LoRA weights of one module; the update is scaling * b @ a.

    Attributes:
        b: float64[m, r].
        a: float64[r, n].

    Raises:
        RankMismatch: the inner dimensions differ.
    """

    b: Array
    a: Array

    def __post_init__(self) -> None:
        """Check that the two weights multiply."""
        if self.b.shape[-1] != self.a.shape[0]:
            raise RankMismatch(f"expected b[m, r] and a[r, n] of one rank, got {self.b.shape} and {self.a.shape}")

    @property
    def rank(self) -> int:
        """The common inner dimension r."""
        return int(self.a.shape[0])


def initial_adapter(rank: int, m: int, fresh_rows: npt.ArrayLike) -> Adapter:
    """The adapter before the first round: b is zero, a holds the first `rank` fresh rows.

    Args:
        rank: the agent's rank, 1 <= rank <= min(m, n).
        m: output width of the module.
        fresh_rows: float[at least rank, n], drawn from the federation seed.

    Returns:
        Adapter of that rank whose update is zero.

    Raises:
        RankMismatch: a rank that is not possible.
        ShapeMismatch: fewer fresh rows than the rank.
        NonFiniteValue: NaN or infinity in the rows.
        ValueOutOfRange: entries too large.

    Source: docs/method.md section 5.
    """
    rows = _check_fresh_rows(fresh_rows, rank)
    check_rank(rank, min(m, rows.shape[1]))
    return Adapter(b=np.zeros((m, rank)), a=rows.copy())


def reparameterize(
    basis: npt.ArrayLike,
    core: npt.ArrayLike,
    rank: int,
    scaling: float,
    fresh_rows: FreshRows,
    *,
    missing: float = MISSING_DIRECTION,
) -> Adapter:
    """Best adapter of a given rank for the update basis @ core.

    Thin SVD core = u S v^T; with D = S / scaling, b = basis u D^(1/2) and a = D^(1/2) v^T for the strongest `rank`
    directions. u and S come from the triangle of a QR decomposition, v^T from u^T core = S v^T. So scaling * b @ a is
    the best fit of that rank (the basis is orthonormal), and the factors are balanced: b.T @ b = a @ a.T, diagonal.
    Directions the core does not have get a zero column in b and a fresh row in a, which leaves the update as it is and
    lets training use them.

    Args:
        basis: float[m, s], orthonormal columns.
        core: float[s, n], from `average`, in true column order.
        rank: the agent's rank, 1 <= rank <= min(m, n); may be larger than s.
        scaling: the agent's LoRA scaling, positive.
        fresh_rows: float[at least rank, n], drawn from the federation seed; row j serves direction j. A function that
            draws them is called only if a direction is missing.
        missing: a direction counts as missing when its singular value is at most this share of the largest.

    Returns:
        Adapter(b float64[m, rank], a float64[rank, n]), strongest direction first; the largest entry of each fitted row
        of a is positive.

    Raises:
        RankMismatch: a rank that is not possible.
        ShapeMismatch: matrices that do not fit together, or fewer fresh rows than the rank.
        NonFiniteValue: NaN or infinity in the input.
        ValueOutOfRange: entries too large, or a scaling that is not positive.

    Source: docs/method.md section 5.
    """
    directions = check_matrix("basis", basis)
    coordinates = check_matrix("core", core, rows=directions.shape[1])
    m, n = directions.shape[0], coordinates.shape[1]
    check_rank(rank, min(m, n))
    factor = check_positive("scaling", scaling)
    triangle: Array = np.asarray(np.linalg.qr(coordinates.T, mode="r"))
    inner, energy, _ = decompose(triangle.T)
    present = min(rank, int(np.count_nonzero(energy > missing * np.max(energy, initial=0.0))))
    strongest, strengths = inner[:, :present], energy[:present]
    scaled = strongest.T @ coordinates
    root = row_signs(scaled) * np.sqrt(strengths / factor)
    a, b = np.empty((rank, n)), np.zeros((m, rank))
    np.multiply(scaled, (root / strengths)[:, None], out=a[:present])
    np.matmul(directions, strongest * root, out=b[:, :present])
    if present < rank:
        rows = fresh_rows() if callable(fresh_rows) else fresh_rows
        a[present:] = _check_fresh_rows(rows, rank, columns=n)[present:]
    return Adapter(b=b, a=a)


def truncate(adapter: Adapter, rank: int) -> Adapter:
    """Keep the first `rank` directions.

    After `reparameterize` these are the strongest, so the result is the best fit of that rank.

    Args:
        adapter: an adapter of at least that rank.
        rank: directions to keep, at least 1.

    Returns:
        Adapter of that rank; arrays are copies.

    Raises:
        RankMismatch: the adapter has fewer directions, or rank is below 1.
    """
    check_rank(rank, adapter.rank)
    return Adapter(b=adapter.b[:, :rank].copy(), a=adapter.a[:rank].copy())


def pad_rank(b: npt.ArrayLike, a: npt.ArrayLike, rank: int) -> tuple[Array, Array]:
    """Append zero columns to b and zero rows to a until they have the given rank.

    The product b @ a stays exactly the same. The scaling must stay too: an adapter with scaling alpha / r that is
    padded to a larger rank keeps alpha / r of the rank it was trained at.

    Args:
        b: float[m, r].
        a: float[r, n].
        rank: the rank wanted, r <= rank <= min(m, n).

    Returns:
        (float64[m, rank], float64[rank, n]).

    Raises:
        RankMismatch: smaller than the present rank, or not possible for the module.
        ShapeMismatch: not matrices, or inner dimensions that differ.
        NonFiniteValue: NaN or infinity in the input.
        ValueOutOfRange: entries too large.

    Source: docs/method.md section 2.
    """
    b_matrix = check_matrix("b", b)
    m, present = b_matrix.shape
    a_matrix = check_matrix("a", a, rows=present)
    check_rank(rank, min(m, a_matrix.shape[1]))
    if rank < present:
        raise RankMismatch(
            f"expected a rank of at least the present {present}, got {rank}", hint="use truncate to lower a rank"
        )
    extra = rank - present
    return np.pad(b_matrix, ((0, 0), (0, extra))), np.pad(a_matrix, ((0, extra), (0, 0)))


def _check_fresh_rows(fresh_rows: npt.ArrayLike, rank: int, columns: int | None = None) -> Array:
    rows = check_matrix("fresh rows", fresh_rows, columns=columns)
    if rows.shape[0] < rank:
        raise ShapeMismatch(f"fresh rows: expected at least {rank} rows, got {rows.shape[0]}")
    return rows[:rank]
