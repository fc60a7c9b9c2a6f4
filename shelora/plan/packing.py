"""How values become the real numbers of a ciphertext: one each, or two fixed-point integers side by side in one.

Dense packing puts `high * 2**21 + low`, in units of 2**-33, into one real number. Sums of such numbers are sums of both
integers at once: nothing is carried from one to the other as long as every sum stays inside 21 bits, which the range of
its basis row guarantees for every cohort of up to 4,096 agents, whatever their values are. Ranges are powers of two
that the aggregator derives from what it holds anyway. Bounds and proofs: docs/method.md section 6.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from shelora.errors import InvalidPlan, MalformedPayload, ShapeMismatch, ValueOutOfRange
from shelora.he.parameters import CkksParameters

Float64 = NDArray[np.float64]

PAIR_SHIFT_BITS: Final = 21
"""The high integer of a pair is multiplied by two to this power."""

PAIR_UNIT: Final = 2.0**-33
"""The real number that stands for the integer 1; with both halves full a pair stays below 2**8."""

MAX_DENSE_AGENTS: Final = 4096
"""Most ciphertexts in one sum of dense values."""

MAX_ROW_NORM: Final = 255.0
"""Longest row of a projection whose values an agent packs densely; weights sum to 1, so no range exceeds 256."""

LARGEST_INTEGER: Final = 2**20 - 2**12
"""The integer that stands for a value as large as its range.

A field holds sums below 2**20; the rest is room for rounding (half a unit for each of 4,096 agents) and noise.
"""

_NOISE_UNITS: Final = 2**7
_LARGEST_SUM: Final = LARGEST_INTEGER + MAX_DENSE_AGENTS // 2 + _NOISE_UNITS
_LEAST_MAX_ABS_VALUE: Final = 2.0**8
_LEAST_RANGE: Final = 2.0**-126
_MOST_RANGE: Final = 2.0**8
_MANTISSA: Final = 0.5  # of a power of two, as frexp gives it
_SLACK: Final = 2.0**-20
"""What float64 and float32 rounding may add to a bound, relative to it; the range has twice as much room."""


class Packing(Enum):
    """How values become the real numbers of a ciphertext."""

    EXACT = "exact"
    DENSE = "dense"


def check_packing(packing: Packing, parameters: CkksParameters, agents: int) -> None:
    """Refuse a packing that a federation of this size could not add up without mistakes.

    Args:
        packing: what the federation wants.
        parameters: CKKS parameters of its key epoch.
        agents: most agents in a cohort.

    Raises:
        InvalidPlan: dense packing for too many agents, or with parameters of too small a range or too much noise.
    """
    if packing is Packing.EXACT:
        return
    if agents > MAX_DENSE_AGENTS:
        raise InvalidPlan(
            f"expected at most {MAX_DENSE_AGENTS} target agents with dense packing, got {agents}",
            hint="choose exact packing, or a smaller cohort",
            context={"field": "packing"},
        )
    noise = parameters.error_bound(agents)
    if parameters.max_abs_value < _LEAST_MAX_ABS_VALUE or noise > _NOISE_UNITS * PAIR_UNIT:
        raise InvalidPlan(
            f"expected CKKS parameters for values up to {_LEAST_MAX_ABS_VALUE:g} with an error of at most "
            f"{_NOISE_UNITS * PAIR_UNIT:.1e} with dense packing, got {parameters.max_abs_value:g} and {noise:.1e}",
            hint="choose exact packing, or a key epoch with the default parameters",
            context={"field": "packing"},
        )


def row_norms(projection: NDArray[np.floating]) -> Float64:
    """How large any value of each basis row can be before weighting: right factors have columns of norm 1 or less.

    Args:
        projection: float[s, r], one agent's left factor in the cohort's basis.

    Returns:
        float64[s], the 2-norm of every row.
    """
    return np.asarray(np.linalg.norm(np.asarray(projection, dtype=np.float64), axis=1))


def agree_ranges(projections: Iterable[NDArray[np.floating]], weights: Sequence[float]) -> Float64:
    """The range of every basis row of a module: a power of two that no sum over the cohort exceeds.

    Only what the aggregator holds anyway goes in. Rows that are longer than an agent may pack count as if they had that
    length: that agent sends nothing, and the others keep their resolution.

    Args:
        projections: per cohort member float[s, r_i]; read once.
        weights: per member its share of the cohort's examples; they sum to 1.

    Returns:
        float64[s], powers of two from 2**-126 to 2**8, exact in float32.

    Source: docs/method.md section 6.
    """
    parts = [
        weight * np.minimum(row_norms(projection), MAX_ROW_NORM)
        for projection, weight in zip(projections, weights, strict=True)
    ]
    sums = np.maximum(np.sum(parts, axis=0) * (1.0 + 2.0 * _SLACK), _LEAST_RANGE)
    mantissas, exponents = np.frexp(sums)
    # A power of two is its own range.
    ranges = np.ldexp(1.0, np.where(mantissas == _MANTISSA, exponents - 1, exponents))
    return np.asarray(ranges)


def quantise(
    name: str, part: Float64, projection: NDArray[np.floating], weight: float, ranges: NDArray[np.floating]
) -> Float64:
    """Round one agent's weighted columns to integers whose sum over any cohort fits its field.

    Args:
        name: the module, for the error message.
        part: float64[s, k], the agent's `cipher_part`.
        projection: float[s, r], the agent's projection as the aggregator answered it.
        weight: the agent's weight.
        ranges: float[s], as the aggregator answered them.

    Returns:
        float64[s, k] of whole numbers; |integer| <= weight * row norm / range * `LARGEST_INTEGER` + 1/2.

    Raises:
        MalformedPayload: ranges that are none.
        ShapeMismatch: arrays that do not belong together.
        ValueOutOfRange: a row longer than `MAX_ROW_NORM`, a range below the agent's own share, or a value beyond what
            its row allows. Nothing is ever clipped.
    """
    if part.ndim != 2 or projection.ndim != 2 or not len(part) == len(projection) == np.size(ranges):
        raise ShapeMismatch(
            f"columns of {name}: expected as many rows as the projection and the ranges have, got shapes {part.shape}, "
            f"{projection.shape} and {np.shape(ranges)}",
            hint="take projection and ranges from the same answer",
            context={"module": name},
        )
    limits = _check_ranges(name, ranges)
    norms = row_norms(projection)
    shares = weight * norms * (1.0 + _SLACK)
    _require(
        name,
        norms <= MAX_ROW_NORM,
        f"coordinates of a norm of at most {MAX_ROW_NORM:g}",
        "training diverged or the update is unscaled; lower the learning rate or the LoRA alpha",
    )
    _require(
        name, shares <= limits, "ranges that hold the own part", "the aggregator's answer is wrong; tell its operator"
    )
    inside = np.all(np.abs(part) <= shares[:, None], axis=1)
    _require(name, inside, "values within the norm of the row", "the right factor is not in canonical form")
    return np.asarray(np.rint(part * (LARGEST_INTEGER / limits)[:, None]))


def dequantise(name: str, integers: Float64, ranges: NDArray[np.floating]) -> Float64:
    """The values that integers, or sums of them, stand for.

    Args:
        name: the module, for the error message.
        integers: float64[s, k] of whole numbers.
        ranges: float[s], those the integers were made with.

    Returns:
        float64[s, k]; for a sum of T agents within T/2 * range / `LARGEST_INTEGER` of the sum of their values, apart
        from the noise of decryption.

    Raises:
        MalformedPayload: ranges that are none.
    """
    return integers * (_check_ranges(name, ranges) / LARGEST_INTEGER)[:, None]


def dense_error(parameters: CkksParameters, agents: int) -> float:
    """Bound on the error of a sum of densely packed values, relative to the range of their basis row.

    Args:
        parameters: CKKS parameters of the key epoch.
        agents: ciphertexts in the sum, T.

    Returns:
        (T/2 + 1/2 + decryption error in units) / `LARGEST_INTEGER`: each agent rounds once, the opened sum is rounded
        once more. 5.0e-6 for 4 agents and 4.1e-5 for 64 with the default parameters.

    Source: docs/method.md section 8.
    """
    return ((agents + 1) / 2 + parameters.error_bound(agents) / PAIR_UNIT) / LARGEST_INTEGER


def join_pairs(slots: Float64, whole: int) -> Float64:
    """Put two integers each into one real number.

    Args:
        slots: float64[count]; from `whole` on whole numbers of at most 2**20 in absolute value.
        whole: slots at the front that stay real numbers of their own.

    Returns:
        float64[whole + ceil((count - whole) / 2)]; slots whole + 2 j and whole + 2 j + 1 are the high and the low half
        of number whole + j. Exact.
    """
    high, low = slots[whole::2], slots[whole + 1 :: 2]
    reals = np.empty(whole + high.size)
    reals[:whole] = slots[:whole]
    reals[whole:] = high * (PAIR_UNIT * 2.0**PAIR_SHIFT_BITS)
    reals[whole : whole + low.size] += low * PAIR_UNIT
    return reals


def split_pairs(reals: Float64, whole: int) -> Float64:
    """Take the integers of summed pairs apart again; the inverse of `join_pairs`, up to one slot at the end.

    Args:
        reals: float64[count], each within 128 `PAIR_UNIT` of the sum of up to `MAX_DENSE_AGENTS` joined numbers.
        whole: real numbers at the front that hold no pairs.

    Returns:
        float64[whole + 2 (count - whole)]; high halves are exact, low halves within the noise, rounded.

    Raises:
        ValueOutOfRange: halves that no cohort of honest agents adds up to.
    """
    steps = reals[whole:] / PAIR_UNIT
    high = np.rint(steps * 2.0**-PAIR_SHIFT_BITS)
    low = np.rint(steps - high * 2.0**PAIR_SHIFT_BITS)
    if steps.size and not max(float(np.abs(high).max()), float(np.abs(low).max())) <= _LARGEST_SUM:
        raise ValueOutOfRange(
            f"opened pairs: expected sums of at most {_LARGEST_SUM} in absolute value, got a larger one",
            hint="the sum was made under other keys, or a member broke the packing rules; wait for the next round",
        )
    slots = np.empty(whole + 2 * steps.size)
    slots[:whole] = reals[:whole]
    slots[whole::2] = high
    slots[whole + 1 :: 2] = low
    return slots


def _require(name: str, holds: NDArray[np.bool_], expected: str, hint: str) -> None:
    """Raise ValueOutOfRange naming the first basis row that breaks a rule, and nothing of its values."""
    if not holds.all():
        raise ValueOutOfRange(
            f"dense packing of {name}, basis row {int(np.argmin(holds))}: expected {expected}, got others",
            hint=hint,
            context={"module": name},
        )


def _check_ranges(name: str, ranges: NDArray[np.floating]) -> Float64:
    """Ranges as they came over the wire, float64[s]; refuses all but powers of two from 2**-126 to 2**8."""
    found = np.asarray(ranges, dtype=np.float64)
    inside = (found >= _LEAST_RANGE) & (found <= _MOST_RANGE)
    if not bool(np.all(inside & (np.frexp(found)[0] == _MANTISSA))):
        raise MalformedPayload(
            f"ranges of {name}: expected powers of two from 2**-126 to 2**8, got another number",
            hint="run the same version of shelora on both sides",
            context={"module": name},
        )
    return found
