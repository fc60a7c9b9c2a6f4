from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shelora.errors import NonFiniteValue, ShapeMismatch, ValueOutOfRange
from shelora.plan import column_sensitivity, order_columns

magnitudes = st.floats(0, 1e300)


@given(st.data(), st.integers(1, 12), st.integers(1, 4))
def test_mean_is_one_and_nothing_overflows(data: st.DataObject, n: int, rank: int) -> None:
    norms = data.draw(hnp.arrays(np.float64, n, elements=magnitudes))
    a = data.draw(hnp.arrays(np.float64, (rank, n), elements=st.floats(-1e300, 1e300)))
    scores = column_sensitivity(norms, a)
    assert scores.shape == (n,)
    assert (scores >= 0).all()
    assert abs(scores.mean() - 1) <= 1e-12


@given(
    hnp.arrays(np.float64, 6, elements=st.floats(0.01, 100)), hnp.arrays(np.float64, (3, 6), elements=st.floats(-9, 9))
)
def test_proportional_to_the_definition(norms: np.ndarray, a: np.ndarray) -> None:
    a[0] += 20
    plain = norms * np.abs(a).sum(axis=0)
    np.testing.assert_allclose(column_sensitivity(norms, a), plain / plain.mean(), rtol=1e-12)


def test_known_values() -> None:
    scores = column_sensitivity(np.array([1.0, 2.0, 0.0]), np.array([[1.0, -1.0, 5.0], [-1.0, 0.0, 5.0]]))
    np.testing.assert_allclose(scores, [1.5, 1.5, 0.0], rtol=1e-15)


def test_float32_is_taken() -> None:
    scores = column_sensitivity(np.ones(2, np.float32), np.ones((1, 2), np.float32))
    assert scores.dtype == np.float64


@pytest.mark.parametrize(("norms", "a"), [(np.zeros(3), np.ones((2, 3))), (np.ones(3), np.zeros((2, 3)))])
def test_all_zero_scores_become_ones(norms: np.ndarray, a: np.ndarray) -> None:
    assert column_sensitivity(norms, a).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("norms", "a", "error"),
    [
        (np.ones((1, 3)), np.ones((2, 3)), ShapeMismatch),
        (np.ones(3), np.ones((3, 2)), ShapeMismatch),
        (np.ones(3), np.ones(3), ShapeMismatch),
        (np.array([1, np.nan, 1]), np.ones((2, 3)), NonFiniteValue),
        (np.ones(3), np.full((2, 3), np.inf), NonFiniteValue),
        (np.array([1.0, -1.0, 1.0]), np.ones((2, 3)), ValueOutOfRange),
    ],
)
def test_bad_arguments_are_refused(norms: np.ndarray, a: np.ndarray, error: type[Exception]) -> None:
    with pytest.raises(error):
        column_sensitivity(norms, a)


@given(hnp.arrays(np.float64, st.integers(0, 20), elements=st.integers(0, 5).map(float)))
def test_order_is_descending_with_ties_by_index(scores: np.ndarray) -> None:
    order = order_columns(scores)
    assert order.dtype == np.int64
    assert order.tolist() == sorted(range(scores.size), key=lambda index: (-scores[index], index))


def test_order_refuses_non_finite_scores() -> None:
    with pytest.raises(NonFiniteValue):
        order_columns(np.array([1.0, np.inf]))
