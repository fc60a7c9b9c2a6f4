"""How agents agree which columns matter most, without the aggregator learning it.

`encrypted`: agents send packed scores as ciphertexts, the aggregator adds them, every agent decrypts and sorts the
same sum. Scores are rounded to a grid far coarser than the decryption error, so that the decrypted sum rounds to the
exact one and all agents sort alike.

`ope`, the paper's way: see `shelora.plan.ranking`.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from shelora.errors import NonFiniteValue, SizeMismatch
from shelora.plan.encoding import encode_items
from shelora.plan.seed import FederationSeed
from shelora.plan.sensitivity import check_scores, order_columns
from shelora.plan.shapes import ModelShapes

MAX_SCORE: Final = 64.0
"""Scores above this multiple of the module's mean count as equally high; fewer than n / 64 columns can lie there."""

MAX_PACKED_VALUE: Final = 2.0**-4
"""What `MAX_SCORE` becomes before encryption."""

MAX_SUMMED_AGENTS: Final = 4095
"""Most agents whose packed values can be added under encryption: the sum stays below 2**8."""

PACKED_STEP: Final = 2.0**-22
"""Grid of packed values: sums survive a decryption error below half of it, 1.19e-7."""


def pack_scores(shapes: ModelShapes, scores: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Prepare sensitivities for encryption.

    Args:
        shapes: the federation's model.
        scores: per module float[n], mean 1, finite, >= 0.

    Returns:
        float64[sum of n] in [0, 2**-4], multiples of 2**-22: the scores cut at `MAX_SCORE`, scaled, and rounded to a
        resolution of 2**-12 of the mean.

    Raises:
        SizeMismatch: not one array per module.
        ShapeMismatch, NonFiniteValue, ValueOutOfRange: a bad array.
    """
    _check_module_count(shapes, len(scores))
    for module, values in zip(shapes.modules, scores, strict=True):
        check_scores(f"scores of {module.name!r}", values, module.in_features)
    if not scores:
        return np.zeros(0)
    packed = np.minimum(np.concatenate(scores), MAX_SCORE) * (MAX_PACKED_VALUE / MAX_SCORE)
    return np.rint(packed / PACKED_STEP) * PACKED_STEP


def unpack_scores(shapes: ModelShapes, values: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """Take a decrypted sum of packed scores apart, exactly.

    Args:
        shapes: the federation's model.
        values: float[sum of n], each within 1.19e-7 of a sum of packed scores.

    Returns:
        Per module float64[n], the sum over agents of their cut and rounded scores, free of decryption error.

    Raises:
        SizeMismatch: another number of values.
        NonFiniteValue: NaN or infinity.
    """
    widths = [module.in_features for module in shapes.modules]
    if values.shape != (sum(widths),):
        raise SizeMismatch(
            f"expected {sum(widths)} scores, got shape {values.shape}",
            hint="decrypt the negotiation of this plan version",
        )
    if not np.isfinite(values).all():
        raise NonFiniteValue("expected finite scores, got NaN or infinity", hint="negotiate the plan again")
    exact = np.maximum(np.rint(np.asarray(values, dtype=np.float64) / PACKED_STEP), 0.0) * PACKED_STEP
    exact *= MAX_SCORE / MAX_PACKED_VALUE
    return np.split(exact, np.cumsum(widths)[:-1]) if widths else []


def priorities_from_scores(shapes: ModelShapes, values: NDArray[np.float64]) -> list[NDArray[np.int64]]:
    """The priority list of every module from a decrypted sum of packed scores.

    Args:
        shapes: the federation's model.
        values: as for `unpack_scores`.

    Returns:
        Per module int64[n], columns from the highest summed score down, ties by column index.

    Raises:
        SizeMismatch, NonFiniteValue: as `unpack_scores`.
    """
    return [order_columns(scores) for scores in unpack_scores(shapes, values)]


def priorities_digest(
    seed: FederationSeed, federation: str, plan_version: int, priorities: Sequence[NDArray[np.int64]]
) -> bytes:
    """A keyed fingerprint by which agents prove to each other, through the aggregator, that they sort alike.

    Args:
        seed: the epoch's federation seed; without it the fingerprint says nothing about the lists.
        federation: federation name.
        plan_version: version of the plan.
        priorities: per module int[n].

    Returns:
        bytes[32]; equal lists give equal digests.
    """
    lists = encode_items(np.asarray(columns, dtype="<i8").tobytes() for columns in priorities)
    key = seed.derive("priorities digest", federation, plan_version)
    return hmac.digest(key, lists, "sha256")


def _check_module_count(shapes: ModelShapes, count: int) -> None:
    if count != len(shapes.modules):
        raise SizeMismatch(
            f"expected scores for {len(shapes.modules)} modules, got {count}",
            hint="give one array per module, in plan order",
        )
