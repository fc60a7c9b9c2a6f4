from __future__ import annotations

import dataclasses
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shelora.errors import NonFiniteValue, RankMismatch, ShapeMismatch, ValueOutOfRange
from shelora.lora import Factors, canonical

BOUND = 1e-12


@st.composite
def weights(draw):
    """LoRA weights of any shape and scale, sometimes rank deficient, sometimes zero."""
    m, n = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    rank = draw(st.integers(1, min(m, n)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    b = rng.standard_normal((m, rank)) * 10.0 ** draw(st.integers(-12, 12))
    a = rng.standard_normal((rank, n)) * 10.0 ** draw(st.integers(-12, 12))
    if draw(st.booleans()):
        b[:, draw(st.integers(0, rank - 1)) :] = 0.0
    if draw(st.booleans()):
        a[draw(st.integers(0, rank - 1)) :] = a[0]
    return b, a, draw(st.floats(1e-3, 1e3))


@given(weights())
@settings(max_examples=200)
def test_product_is_kept_and_right_rows_are_orthonormal(case):
    b, a, scaling = case
    factors = canonical(b, a, scaling)
    allowed = BOUND * scaling * np.linalg.norm(b) * np.linalg.norm(a)
    assert np.linalg.norm(factors.left @ factors.right - scaling * (b @ a)) <= allowed
    assert np.max(np.abs(factors.right @ factors.right.T - np.eye(factors.rank))) <= BOUND
    assert np.max(np.abs(factors.right)) <= 1.0 + BOUND
    assert factors.left.dtype == factors.right.dtype == np.float64


@given(weights())
def test_left_columns_carry_the_singular_values_in_falling_order(case):
    b, a, scaling = case
    factors = canonical(b, a, scaling)
    norms = np.linalg.norm(factors.left, axis=0)
    oracle = np.linalg.svd(scaling * (b @ a), compute_uv=False)[: factors.rank]
    allowed = BOUND * scaling * np.linalg.norm(b) * np.linalg.norm(a)
    np.testing.assert_allclose(norms, oracle, rtol=0, atol=allowed)


@given(weights())
def test_signs_are_fixed(case):
    factors = canonical(*case)
    np.testing.assert_array_equal(np.max(factors.right, axis=1), np.max(np.abs(factors.right), axis=1))


def test_same_update_from_another_parameterisation_gives_the_same_factors():
    rng = np.random.default_rng(5)
    b, a, mix = rng.standard_normal((9, 3)), rng.standard_normal((3, 7)), rng.standard_normal((3, 3))
    one = canonical(b, a, 2.0)
    two = canonical(b @ mix, np.linalg.solve(mix, a), 2.0)
    np.testing.assert_allclose(one.left, two.left, rtol=0, atol=1e-11)
    np.testing.assert_allclose(one.right, two.right, rtol=0, atol=1e-11)


def test_zero_b_leaves_no_energy_but_orthonormal_rows():
    a = np.random.default_rng(6).standard_normal((4, 9))
    factors = canonical(np.zeros((8, 4)), a, 2.0)
    assert not factors.left.any()
    np.testing.assert_allclose(factors.right @ factors.right.T, np.eye(4), rtol=0, atol=BOUND)


def test_both_zero():
    factors = canonical(np.zeros((3, 2)), np.zeros((2, 5)), 1.0)
    assert not factors.left.any()
    np.testing.assert_allclose(factors.right @ factors.right.T, np.eye(2), rtol=0, atol=BOUND)


def test_entries_at_the_bound_do_not_overflow():
    factors = canonical(np.full((3, 2), 1e60), np.full((2, 3), -1e60), 1e60)
    assert np.isfinite(factors.left).all()
    np.testing.assert_allclose(factors.left @ factors.right, np.full((3, 3), -2e180), rtol=1e-12)


def test_float32_input_is_computed_in_float64():
    rng = np.random.default_rng(7)
    b, a = rng.standard_normal((6, 2)).astype(np.float32), rng.standard_normal((2, 5)).astype(np.float32)
    factors = canonical(b, a, 0.5)
    np.testing.assert_allclose(
        factors.left @ factors.right, 0.5 * b.astype(np.float64) @ a.astype(np.float64), rtol=0, atol=1e-13
    )


def test_wide_modules_need_no_product_matrix():
    rng = np.random.default_rng(8)
    b, a = rng.standard_normal((2000, 4)), rng.standard_normal((4, 2000))
    tracemalloc.start()
    canonical(b, a, 1.0)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 2000 * 2000 * 8 / 10


def test_factors_are_frozen_and_must_multiply():
    factors = canonical(np.ones((2, 1)), np.ones((1, 3)), 1.0)
    assert factors.rank == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        factors.left = np.zeros((2, 1))  # type: ignore[misc] # the point of the test
    with pytest.raises(RankMismatch, match=r"\(2, 2\) and \(3, 4\)"):
        Factors(np.ones((2, 2)), np.ones((3, 4)))


@pytest.mark.parametrize(
    ("b", "a", "scaling", "error"),
    [
        (np.ones(3), np.ones((1, 3)), 1.0, ShapeMismatch),
        (np.ones((3, 2)), np.ones((1, 3)), 1.0, ShapeMismatch),
        (np.ones((3, 4)), np.ones((4, 5)), 1.0, RankMismatch),
        (np.ones((5, 4)), np.ones((4, 3)), 1.0, RankMismatch),
        (np.ones((3, 0)), np.ones((0, 3)), 1.0, RankMismatch),
        (np.full((3, 1), np.nan), np.ones((1, 3)), 1.0, NonFiniteValue),
        (np.ones((3, 1)), np.full((1, 3), np.inf), 1.0, NonFiniteValue),
        (np.ones((3, 1)), np.full((1, 3), 1e61), 1.0, ValueOutOfRange),
        (np.ones((3, 1)), np.ones((1, 3)), 0.0, ValueOutOfRange),
        (np.ones((3, 1)), np.ones((1, 3)), np.nan, NonFiniteValue),
    ],
)
def test_refusals(b, a, scaling, error):
    with pytest.raises(error):
        canonical(b, a, scaling)
