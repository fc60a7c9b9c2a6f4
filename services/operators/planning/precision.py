"""How far the average that agents open is from the exact one: bounds of docs/method.md section 8, and what is usual."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from shelora.he.parameters import CkksParameters
from shelora.plan import ModelShapes, Packing, dense_error
from shelora.plan.packing import LARGEST_INTEGER

FLOAT32_UNIT: Final = 2.0**-24
"""Largest relative error of rounding to float32."""

_CAP_EXCESS: Final = {2: (0.019, 0.060), 3: (0.005, 0.016), 4: (0.0015, 0.003)}
"""Cap over the largest rank: excess over the best fit of the largest rank, for agents that are nearly alike and for
agents whose own part is as large as the common one. Measured, docs/method.md section 8."""


@dataclass(frozen=True)
class Basis:
    """What the common basis leaves out.

    Attributes:
        rank_sum: sum of the cohort's ranks.
        rows: basis rows s of every module.
        exact: whether every update lies in the basis.
        kept_share: rows over the rank sum in the module that loses most, 1 when nothing is lost.
        excess: smallest and largest excess error over the best possible fit of the largest rank, as measured for the
            nearest cap that is not larger; None when nothing is lost, or below twice the largest rank.
        verdict: the same in words.
    """

    rank_sum: int
    rows: tuple[int, ...]
    exact: bool
    kept_share: float
    excess: tuple[float, float] | None
    verdict: str


@dataclass(frozen=True)
class Precision:
    """Errors of one round, besides those of a basis that leaves something out.

    Relative to E, the mean of the updates' Frobenius norms under the cohort's weights.

    Attributes:
        bound: no entry of the averaged update is off by more than bound x E + cipher_bound.
        typical: usual Frobenius error of the averaged update over its norm.
        cipher_bound: what decryption adds to an entry of the averaged update, absolute.
        dense_tensor_bound: what it adds to an entry of a tensor that is trained whole, absolute.
    """

    bound: float
    typical: float
    cipher_bound: float
    dense_tensor_bound: float


def basis_of(shapes: ModelShapes, ranks: Sequence[int], rows: tuple[int, ...], cap: int) -> Basis:
    """Whether the basis is exact, and what the cap costs if not."""
    total, largest = sum(ranks), max(ranks)
    wanted = [min(total, module.out_features) for module in shapes.modules]
    kept = min((s / most for s, most in zip(rows, wanted, strict=True)), default=1.0)
    if kept == 1.0:
        return Basis(total, rows, True, 1.0, None, "the average is exact")
    ratio = max((known for known in _CAP_EXCESS if known <= cap / largest), default=None)
    lost = f"the average keeps the {cap} strongest of up to {total} directions"
    if ratio is None:
        return Basis(
            total, rows, False, kept, None, f"{lost}; what that costs was not measured below a cap of 2 x largest rank"
        )
    low, high = _CAP_EXCESS[ratio]
    cost = (
        f"{lost}; of 20 correlated agents a fit at {ratio} x the largest rank was {low:.2%} to {high:.2%} above the "
        "least error"
    )
    return Basis(total, rows, False, kept, (low, high), cost)


def precision_of(
    shapes: ModelShapes, rows: tuple[int, ...], packing: Packing, parameters: CkksParameters, members: int
) -> Precision:
    """Errors of a round in which so many members count.

    Source: docs/method.md section 8.
    """
    s = max(rows, default=0)
    width = max((module.in_features for module in shapes.modules), default=0)
    wire = FLOAT32_UNIT * (2 * math.sqrt(s) + 4) if s else 0.0
    # Four roundings that do not know of each other, each uniform in its unit.
    usual = FLOAT32_UNIT * math.sqrt(4 / 3) if s else 0.0
    noise = parameters.error_bound(members)
    if packing is Packing.EXACT:
        return Precision(wire, usual, math.sqrt(s) * noise, noise)
    pairs = 2 * math.sqrt(width * members / 12) / LARGEST_INTEGER
    return Precision(wire + 2 * dense_error(parameters, members), math.hypot(usual, pairs), 0.0, noise)
