from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shelora.errors import NonFiniteValue, ShapeMismatch, ValueOutOfRange
from shelora.lora import Factors, average, canonical, cipher_part, dense_average, plain_part, plaintext_average, project


@st.composite
def members(draw):
    """One member's projection and right factor, its weight and how many columns it encrypts."""
    rows, rank, n = draw(st.integers(1, 8)), draw(st.integers(1, 5)), draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    hidden = draw(st.integers(0, n))
    return rng.standard_normal((rows, rank)), rng.standard_normal((rank, n)), draw(st.floats(0.01, 5.0)), hidden


@given(members())
def test_the_two_parts_add_up_to_the_whole_for_any_split(member):
    projection, right, weight, hidden = member
    n = right.shape[1]
    plain = plain_part(projection, right[:, hidden:], weight, n)
    cipher = cipher_part(projection, right[:, :hidden], weight)
    assert plain.shape == (projection.shape[0], n)
    assert cipher.shape == (projection.shape[0], hidden)
    assert not plain[:, :hidden].any()
    np.testing.assert_allclose(average(plain, cipher, weight), projection @ right, rtol=1e-12, atol=1e-12)


@given(members())
def test_cipher_entries_stay_below_weight_times_the_largest_singular_value(member):
    left, _, weight, _ = member
    rows, rank = left.shape
    right = np.linalg.qr(np.random.default_rng(rank).standard_normal((12, rank)))[0].T
    directions = np.linalg.qr(np.random.default_rng(rows).standard_normal((rows, rows)))[0]
    entries = cipher_part(project(directions, left), right, weight)
    assert np.max(np.abs(entries)) <= weight * np.linalg.norm(left, 2) * (1 + 1e-12)


def test_project_is_the_transposed_product():
    rng = np.random.default_rng(1)
    directions, left = rng.standard_normal((6, 3)), rng.standard_normal((6, 2))
    np.testing.assert_allclose(project(directions, left), np.einsum("ms,mr->sr", directions, left), rtol=0, atol=1e-14)


def test_average_leaves_its_input_alone():
    plain, opened = np.ones((2, 3)), np.full((2, 1), 5.0)
    np.testing.assert_array_equal(average(plain, opened, 2.0), [[3.0, 0.5, 0.5]] * 2)
    np.testing.assert_array_equal(plain, np.ones((2, 3)))


def test_average_with_nothing_encrypted():
    np.testing.assert_array_equal(average(np.ones((2, 3)), np.zeros((2, 0)), 4.0), np.full((2, 3), 0.25))


@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 4)])
def test_dense_average_of_any_shape(shape):
    rng = np.random.default_rng(2)
    terms, weights = [rng.standard_normal(shape) for _ in range(3)], [1.0, 2.0, 5.0]
    total = sum(weight * term for weight, term in zip(weights, terms, strict=True))
    found = dense_average(total, 8.0)
    assert np.shape(found) == shape
    np.testing.assert_allclose(found, np.average(terms, axis=0, weights=weights), rtol=0, atol=1e-14)


def test_plaintext_average_is_the_weighted_mean_of_the_products():
    rng = np.random.default_rng(3)
    pairs = [(rng.standard_normal((5, rank)), rng.standard_normal((rank, 4))) for rank in (1, 2, 4)]
    weights = [3.0, 1.0, 6.0]
    found = plaintext_average([canonical(b, a, 2.0) for b, a in pairs], weights)
    oracle = sum(weight * 2.0 * b @ a for weight, (b, a) in zip(weights, pairs, strict=True)) / 10.0
    np.testing.assert_allclose(found, oracle, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: project(np.ones((3, 2)), np.ones((4, 2))), ShapeMismatch),
        (lambda: project(np.ones(3), np.ones((3, 2))), ShapeMismatch),
        (lambda: plain_part(np.ones((3, 2)), np.ones((1, 4)), 1.0, 4), ShapeMismatch),
        (lambda: plain_part(np.ones((3, 2)), np.ones((2, 5)), 1.0, 4), ShapeMismatch),
        (lambda: plain_part(np.ones((3, 2)), np.ones((2, 4)), 0.0, 4), ValueOutOfRange),
        (lambda: plain_part(np.ones((3, 2)), np.full((2, 4), np.nan), 1.0, 4), NonFiniteValue),
        (lambda: cipher_part(np.ones((3, 2)), np.ones((3, 4)), 1.0), ShapeMismatch),
        (lambda: cipher_part(np.ones((3, 2)), np.ones((2, 4)), -1.0), ValueOutOfRange),
        (lambda: average(np.ones((3, 4)), np.ones((2, 4)), 1.0), ShapeMismatch),
        (lambda: average(np.ones((3, 4)), np.ones((3, 5)), 1.0), ShapeMismatch),
        (lambda: average(np.ones((3, 4)), np.ones((3, 4)), 0.0), ValueOutOfRange),
        (lambda: average(np.ones((3, 4)), np.full((3, 4), np.inf), 1.0), NonFiniteValue),
        (lambda: dense_average([1.0, np.nan], 1.0), NonFiniteValue),
        (lambda: dense_average([1.0], 0.0), ValueOutOfRange),
        (lambda: plaintext_average([], []), ShapeMismatch),
        (lambda: plaintext_average([Factors(np.ones((2, 1)), np.ones((1, 2)))], [0.0]), ValueOutOfRange),
        (
            lambda: plaintext_average([Factors(np.ones((2, 1)), np.ones((1, n))) for n in (2, 3)], [1.0, 1.0]),
            ShapeMismatch,
        ),
        (
            lambda: plaintext_average([Factors(np.ones((m, 1)), np.ones((1, 2))) for m in (2, 3)], [1.0, 1.0]),
            ShapeMismatch,
        ),
    ],
)
def test_refusals(call, error):
    with pytest.raises(error):
        call()
