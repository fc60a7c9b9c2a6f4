from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from shelora.errors import InvalidPlan, MalformedPayload, ShapeMismatch, ValueOutOfRange
from shelora.he.parameters import CkksParameters
from shelora.lora import canonical, cipher_part
from shelora.plan import (
    MAX_DENSE_AGENTS,
    DenseShape,
    ModuleShape,
    Packing,
    SlotLayout,
    agree_ranges,
    check_packing,
    dense_error,
    dequantise,
    quantise,
)
from shelora.plan.packing import LARGEST_INTEGER, PAIR_UNIT, join_pairs, row_norms, split_pairs

PARAMETERS = CkksParameters(modulus=1152921504606830593)
NOISE = PARAMETERS.error_bound(MAX_DENSE_AGENTS)
LARGEST_SUM = LARGEST_INTEGER + MAX_DENSE_AGENTS // 2
"""What cohorts of honest agents can add up to."""

INTEGERS = st.integers(-LARGEST_SUM, LARGEST_SUM) | st.sampled_from([-LARGEST_SUM, -1, 0, 1, LARGEST_SUM])


def slot_vectors(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    whole = draw(st.lists(st.floats(-255, 255), max_size=3))
    return np.array(whole + draw(st.lists(INTEGERS, max_size=9)), dtype=np.float64), len(whole)


vectors = st.composite(slot_vectors)()


@given(vectors)
def test_pairs_come_apart_as_they_were_joined(vector: tuple[np.ndarray, int]) -> None:
    slots, whole = vector
    reals = join_pairs(slots, whole)
    assert reals.size == whole + math.ceil((slots.size - whole) / 2)
    assert np.abs(reals).max(initial=0.0) < PARAMETERS.max_abs_value
    found = split_pairs(reals, whole)
    assert np.array_equal(found[: slots.size], slots)
    assert not found[slots.size :].any()


@given(vectors, st.integers(0, 2**32 - 1))
def test_noise_reaches_only_the_low_half(vector: tuple[np.ndarray, int], seed: int) -> None:
    """Also where the low half is as large as it can be: nothing is carried into or borrowed from the high half."""
    slots, whole = vector
    reals = join_pairs(slots, whole)
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], reals.size)
    found = split_pairs(reals + NOISE * signs, whole)[: slots.size]
    assert np.array_equal(found[whole::2], slots[whole::2])
    assert np.abs(found[whole + 1 :: 2] - slots[whole + 1 :: 2]).max(initial=0.0) <= NOISE / PAIR_UNIT + 0.5


@given(st.lists(st.tuples(st.integers(-5000, 5000), st.integers(-5000, 5000)), min_size=1, max_size=64))
def test_sums_of_pairs_are_pairs_of_sums(pairs: list[tuple[int, int]]) -> None:
    total = sum(join_pairs(np.array(pair, dtype=np.float64), 0) for pair in pairs)
    assert split_pairs(np.asarray(total), 0).tolist() == np.sum(pairs, axis=0).tolist()


def test_sums_that_nobody_can_have_made_are_refused() -> None:
    for high, low in ((LARGEST_SUM + 129, 0), (0, LARGEST_SUM + 129), (0, -LARGEST_SUM - 129)):
        reals = join_pairs(np.array([high, low], dtype=np.float64), 0)
        with pytest.raises(ValueOutOfRange, match="opened pairs"):
            split_pairs(reals, 0)
    garbage = np.random.default_rng(1).uniform(-256, 256, 4096)
    with pytest.raises(ValueOutOfRange):
        split_pairs(garbage, 0)


def rows_of(draw: st.DrawFn, rows: int) -> np.ndarray:
    rank = draw(st.integers(1, 4))
    return draw(arrays.arrays(np.float32, (rows, rank), elements=st.floats(-100, 100, width=32)))


@st.composite
def cohort_projections(draw: st.DrawFn) -> tuple[list[np.ndarray], list[float]]:
    rows = draw(st.integers(1, 4))
    count = draw(st.integers(1, 6))
    examples = [draw(st.integers(1, 1000)) for _ in range(count)]
    return [rows_of(draw, rows) for _ in range(count)], [share / sum(examples) for share in examples]


@given(cohort_projections())
def test_ranges_are_the_next_powers_of_two(cohort: tuple[list[np.ndarray], list[float]]) -> None:
    projections, weights = cohort
    ranges = agree_ranges(iter(projections), weights)
    assert np.array_equal(ranges.astype(np.float32), ranges)
    assert (np.frexp(ranges)[0] == 0.5).all()
    sums = sum(weight * row_norms(projection) for projection, weight in zip(projections, weights, strict=True))
    assert (sums <= ranges).all()
    assert (ranges <= np.maximum(2.0 * sums * (1 + 2.0**-18), 2.0**-126)).all()


def test_ranges_at_the_edges() -> None:
    """A power of two gets the next one, for rounding; an empty row the smallest; a diverged agent at most 256."""
    row = np.array([[0.75], [1.0], [0.0], [1e30]], dtype=np.float32)
    assert agree_ranges([row, row], [0.25, 0.75]).tolist() == [1.0, 2.0, 2.0**-126, 256.0]
    exact = agree_ranges([np.array([[1.0 / (1.0 + 2.0**-19)]])], [1.0])
    assert exact.tolist() == [1.0]
    diverged = agree_ranges([np.array([[1e30]]), np.array([[1.0]])], [0.001, 0.999])
    assert diverged.tolist() == [2.0]


LAYOUT = SlotLayout(
    (DenseShape("head", (2, 3)),), (ModuleShape("a", 6, 9), ModuleShape("b", 5, 7)), (4, 3), 8, Packing.DENSE
)


@st.composite
def agents(draw: st.DrawFn) -> tuple[list[tuple[int, tuple[int, int], int]], int]:
    members = draw(
        st.lists(
            st.tuples(st.integers(1, 3), st.tuples(st.integers(0, 9), st.integers(0, 7)), st.integers(1, 1000)),
            min_size=1,
            max_size=64,
        )
    )
    return members, draw(st.integers(0, 2**32 - 1))


@given(agents(), st.floats(1e-12, 100), st.booleans())
def test_a_packed_sum_is_the_float64_sum_within_the_bound(
    cohort: tuple[list[tuple[int, tuple[int, int], int]], int], size: float, last_drops: bool
) -> None:
    """Whatever ranks, budgets, weights and magnitudes, and whoever drops out: against sums in float64."""
    members, seed = cohort
    rng = np.random.default_rng(seed)
    weights = [examples / sum(one[2] for one in members) for *_, examples in members]
    projections = [[rng.normal(size=(rows, rank)) for rows in LAYOUT.basis_rows] for rank, *_ in members]
    for one in projections:
        for matrix in one:
            matrix *= size / max(1.0, float(np.linalg.norm(matrix)))
    ranges = [agree_ranges([one[index] for one in projections], weights) for index in range(2)]
    counted = len(members) - (last_drops and len(members) > 1)
    total = np.zeros(LAYOUT.reals(LAYOUT.total_slots))
    heads, true = np.zeros((2, 3)), [np.zeros((4, 9)), np.zeros((3, 7))]
    for (rank, columns, _), weight, own in list(zip(members, weights, projections, strict=True))[:counted]:
        parts, integers = [], []
        for index, (module, k) in enumerate(zip(LAYOUT.modules, columns, strict=True)):
            right = canonical(rng.normal(size=(5, rank)), rng.normal(size=(rank, module.in_features)), 1.0).right
            parts.append(cipher_part(own[index], right[:, :k], weight))
            integers.append(quantise(module.name, parts[-1], own[index], weight, ranges[index]))
        head = rng.normal(size=(2, 3))
        reals = LAYOUT.to_reals(LAYOUT.pack([head], integers))
        assert -(-reals.size // 8) == LAYOUT.blocks(columns)
        total[: reals.size] += reals
        heads += head
        for matrix, part, k in zip(true, parts, columns, strict=True):
            matrix[:, :k] += part
    dense, sums = LAYOUT.unpack(LAYOUT.from_reals(total))
    np.testing.assert_allclose(dense[0], heads, atol=1e-12)
    for module, found, row_ranges, wanted in zip(LAYOUT.modules, sums, ranges, true, strict=True):
        error = np.abs(dequantise(module.name, found, row_ranges) - wanted)
        assert (error <= dense_error(PARAMETERS, counted) * row_ranges[:, None]).all()


@pytest.mark.parametrize("agents", [4, 64, 1000, MAX_DENSE_AGENTS])
def test_the_worst_cohort_fits_and_errs_as_bounded(agents: int) -> None:
    """Everybody as large as allowed, rounded up alike, neighbours of opposite signs: the sums are still exact."""
    share = (LARGEST_INTEGER // agents - 0.499) / LARGEST_INTEGER
    projection, weight = np.array([[share * agents]]), 1.0 / agents
    ranges = agree_ranges([projection] * agents, [weight] * agents)
    assert ranges.tolist() == [1.0]
    part = share * np.array([[1.0, -1.0, -1.0, 1.0, 1.0]])
    integers = quantise("a", part, projection, weight, ranges)
    assert np.abs(integers).tolist() == [[LARGEST_INTEGER // agents] * 5]
    reals = join_pairs(integers[0], 0) * agents
    assert np.abs(reals).max() < PARAMETERS.max_abs_value
    opened = split_pairs(reals, 0)[:5]
    assert np.array_equal(opened, integers[0] * agents)
    error = np.abs(dequantise("a", opened[None], ranges) - part * agents).max()
    assert 0.49 * agents / LARGEST_INTEGER <= error <= dense_error(PARAMETERS, agents)


def test_values_beyond_their_row_are_refused_and_never_clipped() -> None:
    projection, ranges = np.array([[3.0, 4.0], [0.0, 0.0]]), np.array([4.0, 2.0**-126])
    good = np.array([[2.5, -2.5], [0.0, 0.0]])
    assert quantise("a", good, projection, 0.5, ranges)[0].tolist() == [652800.0, -652800.0]
    for row, column, value in ((0, 0, 2.50001), (0, 1, -1e300), (1, 0, 1e-30), (0, 0, np.nan), (0, 1, np.inf)):
        bad = good.copy()
        bad[row, column] = value
        with pytest.raises(ValueOutOfRange, match=rf"row {row}: expected values within"):
            quantise("a", bad, projection, 0.5, ranges)


def test_a_diverged_agent_and_a_wrong_range_are_refused() -> None:
    part = np.zeros((1, 3))
    with pytest.raises(ValueOutOfRange, match="norm of at most 255"):
        quantise("a", part, np.array([[256.0]]), 1e-3, np.array([256.0]))
    with pytest.raises(ValueOutOfRange, match="ranges that hold the own part"):
        quantise("a", part, np.array([[3.0]]), 0.5, np.array([1.0]))
    with pytest.raises(ShapeMismatch):
        quantise("a", part, np.array([[3.0]]), 0.5, np.array([2.0, 2.0]))
    for wrong in (3.0, 0.0, -1.0, 512.0, 2.0**-127, np.nan, np.inf):
        with pytest.raises(MalformedPayload, match="powers of two"):
            quantise("a", part, np.array([[0.0]]), 0.5, np.array([wrong]))
        with pytest.raises(MalformedPayload, match="powers of two"):
            dequantise("a", part, np.array([wrong]))


def test_packing_is_refused_where_it_could_not_be_added() -> None:
    check_packing(Packing.DENSE, PARAMETERS, MAX_DENSE_AGENTS)
    check_packing(Packing.EXACT, PARAMETERS, 100_000)
    with pytest.raises(InvalidPlan, match="at most 4096 target agents with dense packing, got 4097"):
        check_packing(Packing.DENSE, PARAMETERS, 4097)
    for weak in ({"scale_bits": 51}, {"scale_bits": 48}):
        with pytest.raises(InvalidPlan, match="expected CKKS parameters"):
            check_packing(Packing.DENSE, dataclasses.replace(PARAMETERS, **weak), MAX_DENSE_AGENTS)


def test_documented_errors() -> None:
    assert dense_error(PARAMETERS, 4) == pytest.approx(5.0e-6, rel=0.02)
    assert dense_error(PARAMETERS, 64) == pytest.approx(4.1e-5, rel=0.02)
    assert NOISE / PAIR_UNIT < 84
