from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shelora.errors import NonFiniteValue, RankMismatch, ShapeMismatch, ValueOutOfRange
from shelora.lora import BasisSketch, basis, basis_rows

ORTHONORMAL = 1e-12
SPAN = 1e-9


@st.composite
def cohorts(draw):
    """Left factors of one module with their weights, and a cap below, at or above the sum of ranks."""
    m = draw(st.integers(1, 20))
    ranks = draw(st.lists(st.integers(1, min(m, 6)), min_size=1, max_size=6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lefts = [rng.standard_normal((m, rank)) for rank in ranks]
    if draw(st.booleans()):
        lefts[0][:] = 0.0
    return lefts, [draw(st.floats(0.01, 10.0)) for _ in ranks], draw(st.integers(1, sum(ranks) + 3))


def stack(lefts, weights):
    return np.concatenate([weight * left for left, weight in zip(lefts, weights, strict=True)], axis=1)


def sketch_of(lefts, weights, cap):
    sketch = BasisSketch(lefts[0].shape[0], cap)
    for left, weight in zip(lefts, weights, strict=True):
        sketch.add(left, weight)
    return sketch


@given(cohorts())
@settings(max_examples=150)
def test_batch_basis_is_orthonormal_and_drops_the_least_energy_possible(cohort):
    lefts, weights, cap = cohort
    found = basis(lefts, weights, cap)
    m = lefts[0].shape[0]
    rows = basis_rows(m, [left.shape[1] for left in lefts], cap)
    assert found.shape == (m, rows)
    assert np.max(np.abs(found.T @ found - np.eye(rows))) <= ORTHONORMAL
    stacked = stack(lefts, weights)
    best = np.sqrt(np.sum(np.linalg.svd(stacked, compute_uv=False)[rows:] ** 2))
    dropped = np.linalg.norm(stacked - found @ (found.T @ stacked))
    assert abs(dropped - best) <= 1e-12 * max(1.0, float(np.linalg.norm(stacked)))


@given(cohorts())
def test_signs_are_fixed(cohort):
    found = basis(*cohort)
    np.testing.assert_array_equal(np.max(found, axis=0), np.max(np.abs(found), axis=0))


@given(cohorts())
@settings(max_examples=150)
def test_streaming_equals_batch_while_nothing_is_dropped(cohort):
    lefts, weights, cap = cohort
    sketch = sketch_of(lefts, weights, cap)
    found, batch = sketch.basis(), basis(lefts, weights, cap)
    assert sketch.rank_sum == sum(left.shape[1] for left in lefts)
    assert found.shape == batch.shape
    assert np.max(np.abs(found.T @ found - np.eye(found.shape[1]))) <= ORTHONORMAL
    stacked = stack(lefts, weights)
    if sketch.rank_sum <= cap:
        assert np.linalg.norm(stacked - found @ (found.T @ stacked)) <= 1e-12 * max(1.0, float(np.linalg.norm(stacked)))
    if sketch.rank_sum <= 2 * cap:
        np.testing.assert_array_equal(found, batch)


@given(cohorts(), st.randoms(use_true_random=False))
def test_merge_is_associative_and_commutative_while_nothing_is_dropped(cohort, shuffler):
    lefts, weights, _ = cohort
    cap = sum(left.shape[1] for left in lefts)
    pairs = list(zip(lefts, weights, strict=True))
    shuffler.shuffle(pairs)
    sketches = [sketch_of([left], [weight], cap) for left, weight in pairs]
    while len(sketches) > 1:
        position = shuffler.randrange(len(sketches) - 1)
        sketches[position].merge(sketches.pop(position + 1))
    stacked = stack(lefts, weights)
    oracle = basis(lefts, weights, cap)
    found = sketches[0].basis()
    assert sketches[0].rank_sum == cap
    np.testing.assert_allclose(found @ (found.T @ stacked), oracle @ (oracle.T @ stacked), rtol=0, atol=SPAN)


def test_merge_beyond_the_cap_keeps_the_dominant_directions():
    rng = np.random.default_rng(3)
    shared = np.linalg.qr(rng.standard_normal((40, 4)))[0]
    lefts = [shared @ rng.standard_normal((4, 4)) + 1e-7 * rng.standard_normal((40, 4)) for _ in range(12)]
    parts = [sketch_of(lefts[start : start + 3], [1.0] * 3, 4) for start in range(0, 12, 3)]
    first = parts[0].merge(parts[1]).merge(parts[2].merge(parts[3]))
    assert first is parts[0]
    assert first.rank_sum == 48
    found = first.basis()
    assert found.shape == (40, 4)
    assert np.linalg.norm(shared - found @ (found.T @ shared)) <= 1e-6


def test_merge_leaves_the_other_sketch_alone():
    rng = np.random.default_rng(4)
    one, two = (sketch_of([rng.standard_normal((6, 2))], [1.0], 4) for _ in range(2))
    before = two.basis()
    one.merge(two)
    one.add(rng.standard_normal((6, 2)), 1.0)
    np.testing.assert_array_equal(two.basis(), before)
    assert (two.rank_sum, one.rank_sum) == (2, 6)


def test_sketch_memory_is_bounded():
    rng = np.random.default_rng(9)
    sketch = BasisSketch(30, 5)
    for _ in range(50):
        sketch.add(rng.standard_normal((30, 3)), 1.0)
        assert sketch._columns.shape[1] <= 2 * 5
    assert (sketch.rows, sketch.cap, sketch.rank_sum) == (30, 5, 150)
    assert sketch.basis().shape == (30, 5)


def test_sketch_does_not_keep_the_callers_array():
    left = np.random.default_rng(10).standard_normal((5, 2))
    sketch = BasisSketch(5, 4)
    sketch.add(left, 1.0)
    before = sketch.basis()
    left[:] = 7.0
    np.testing.assert_array_equal(sketch.basis(), before)


def test_all_zero_factors_still_give_an_orthonormal_basis():
    found = basis([np.zeros((6, 2)), np.zeros((6, 1))], [1.0, 2.0], 8)
    np.testing.assert_allclose(found.T @ found, np.eye(3), rtol=0, atol=ORTHONORMAL)


@pytest.mark.parametrize(
    ("m", "ranks", "cap", "rows"), [(10, [4], 16, 4), (10, [4, 4], 6, 6), (10, [8, 8], 64, 10), (3, [3, 1, 2], 100, 3)]
)
def test_basis_rows(m, ranks, cap, rows):
    assert basis_rows(m, ranks, cap) == rows


@pytest.mark.parametrize(
    ("m", "ranks", "cap", "error"),
    [(10, [], 4, RankMismatch), (10, [0], 4, RankMismatch), (3, [4], 4, RankMismatch), (10, [2], 0, ValueOutOfRange)],
)
def test_basis_rows_refusals(m, ranks, cap, error):
    with pytest.raises(error):
        basis_rows(m, ranks, cap)


@pytest.mark.parametrize(
    ("lefts", "weights", "cap", "error"),
    [
        ([], [], 4, ShapeMismatch),
        ([np.ones((3, 1))], [1.0, 1.0], 4, ShapeMismatch),
        ([np.ones((3, 1)), np.ones((4, 1))], [1.0, 1.0], 4, ShapeMismatch),
        ([np.ones((3, 4))], [1.0], 4, RankMismatch),
        ([np.ones((3, 0))], [1.0], 4, RankMismatch),
        ([np.ones((3, 1))], [0.0], 4, ValueOutOfRange),
        ([np.ones((3, 1))], [np.nan], 4, NonFiniteValue),
        ([np.full((3, 1), np.nan)], [1.0], 4, NonFiniteValue),
        ([np.ones((3, 1))], [1.0], 0, ValueOutOfRange),
    ],
)
def test_batch_refusals(lefts, weights, cap, error):
    with pytest.raises(error):
        basis(lefts, weights, cap)


def test_sketch_refusals():
    with pytest.raises(ShapeMismatch, match="at least 1 row"):
        BasisSketch(0, 4)
    with pytest.raises(ValueOutOfRange, match="cap of at least 1"):
        BasisSketch(4, 0)
    sketch = BasisSketch(4, 3)
    with pytest.raises(ShapeMismatch, match="at least one left factor"):
        sketch.basis()
    with pytest.raises(ShapeMismatch, match=r"got \(5, 1\)"):
        sketch.add(np.ones((5, 1)), 1.0)
    with pytest.raises(RankMismatch):
        sketch.add(np.ones((4, 5)), 1.0)
    with pytest.raises(ShapeMismatch, match="cap 3, got 4 rows and cap 2"):
        sketch.merge(BasisSketch(4, 2))
    with pytest.raises(ShapeMismatch, match="got 5 rows and cap 3"):
        sketch.merge(BasisSketch(5, 3))
    assert sketch.rank_sum == 0
