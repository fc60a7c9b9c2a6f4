"""The secret order in which columns travel (docs/method.md, column order).

An order is an int64 vector: `order[p]` is the true column index at wire position `p`. The aggregator's algebra is
column by column and never needs it. It hides which input feature a plain column belongs to; it is an obfuscation on
top of the encryption, not a replacement for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from shelora.errors import InvalidPlan, ShapeMismatch
from shelora.plan.seed import FederationSeed, keyed_permutation

Scalar = TypeVar("Scalar", bound=np.generic)


def wire_order(
    seed: FederationSeed,
    federation: str,
    plan_version: int,
    round: int,
    module: str,
    n: int,
    priority: NDArray[np.int64],
    levels: Sequence[int],
) -> NDArray[np.int64]:
    """The column order of one module in one round.

    The columns `priority[:levels[0]]` come first, then `priority[levels[0]:levels[1]]`, and so on, then the rest. So
    an agent that encrypts `k` columns, `k` one of the levels, encrypts exactly the `k` most sensitive ones: budgets
    nest. Inside each of these segments the order is a keyed permutation, fresh for every federation, plan version,
    round and module: it carries nothing about the sensitivities, and positions of two rounds cannot be linked beyond
    the segment.

    Args:
        seed: the epoch's federation seed.
        federation: federation name.
        plan_version: version of the plan.
        round: round number.
        module: module name.
        n: number of columns.
        priority: int[n], all columns, the most sensitive first.
        levels: the distinct encrypted-column counts of the plan for this module, each 0 to n; order and repetition do
            not matter.

    Returns:
        int64[n], a permutation.

    Raises:
        ShapeMismatch: `priority` has another length.
        InvalidPlan: `priority` is no permutation, or a level is out of range.
    """
    columns = np.asarray(priority, dtype=np.int64)
    if columns.shape != (n,):
        raise ShapeMismatch(
            f"expected a priority list of shape ({n},), got {columns.shape}",
            hint="negotiate the plan again",
            context={"module": module},
        )
    _check_permutation(columns)
    cuts = sorted({0, n, *levels})
    if cuts[0] < 0 or cuts[-1] > n:
        raise InvalidPlan(
            f"expected encrypted-column counts between 0 and {n}, got {sorted(set(levels))}",
            hint="negotiate the plan again",
            context={"module": module},
        )
    order = np.empty(n, dtype=np.int64)
    for first, last in itertools.pairwise(cuts):
        key = seed.derive("wire order", federation, plan_version, round, module, first, last)
        order[first:last] = columns[first:last][keyed_permutation(key, last - first)]
    return order


def invert(order: NDArray[np.int64]) -> NDArray[np.int64]:
    """The wire position of every true column.

    Args:
        order: int[n], a permutation.

    Returns:
        int64[n] with `result[order[p]] == p`.

    Raises:
        InvalidPlan: `order` is no permutation.
    """
    _check_permutation(order)
    positions = np.empty(order.size, dtype=np.int64)
    positions[order] = np.arange(order.size)
    return positions


def apply(order: NDArray[np.int64], matrix: NDArray[Scalar]) -> NDArray[Scalar]:
    """Put columns into wire order.

    Args:
        order: int[n], a permutation.
        matrix: [r, n], columns in true order.

    Returns:
        [r, n], a copy whose column `p` is the true column `order[p]`.

    Raises:
        ShapeMismatch: the matrix does not have n columns.
    """
    _check_width(order, matrix)
    return matrix[:, order]


def undo(order: NDArray[np.int64], matrix: NDArray[Scalar]) -> NDArray[Scalar]:
    """Put columns back into true order; the inverse of `apply`.

    Args:
        order: int[n], a permutation.
        matrix: [s, n], columns in wire order.

    Returns:
        [s, n], a copy in true order.

    Raises:
        ShapeMismatch: the matrix does not have n columns.
        InvalidPlan: `order` is no permutation.
    """
    _check_width(order, matrix)
    return matrix[:, invert(order)]


def _check_permutation(order: NDArray[np.int64]) -> None:
    if order.ndim != 1 or not np.array_equal(np.sort(order), np.arange(order.size)):
        raise InvalidPlan(
            f"expected every column 0 to {order.size - 1} exactly once, got another list",
            hint="negotiate the plan again",
        )


def _check_width(order: NDArray[np.int64], matrix: NDArray[Any]) -> None:
    if matrix.ndim != 2 or matrix.shape[1] != order.size:
        raise ShapeMismatch(
            f"expected a matrix with {order.size} columns, got shape {matrix.shape}",
            hint="the order belongs to another module",
        )
