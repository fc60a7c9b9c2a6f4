from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shelora.errors import NonFiniteValue, RankMismatch, ShapeMismatch, ValueOutOfRange
from shelora.lora import arrays


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_entries_must_be_finite(bad):
    with pytest.raises(NonFiniteValue, match="left factor: expected finite"):
        arrays.check_entries("left factor", [1.0, bad])


def test_entries_are_bounded_and_float32_always_fits():
    largest = np.finfo(np.float32).max
    assert arrays.check_entries("b", np.array([largest, -largest])).dtype == np.float64
    with pytest.raises(ValueOutOfRange, match="at most 1e\\+60"):
        arrays.check_entries("b", [-2e60])


def test_entries_of_a_float64_array_are_not_copied():
    array = np.ones((2, 3))
    assert arrays.check_entries("b", array) is array


def test_empty_array_passes():
    assert arrays.check_matrix("plain columns", np.zeros((4, 0)), rows=4).shape == (4, 0)


@pytest.mark.parametrize(
    ("shape", "rows", "columns"), [((2, 3), 3, None), ((2, 3), None, 2), ((6,), None, None), ((1, 2, 3), 1, 2)]
)
def test_matrix_shape_is_checked(shape, rows, columns):
    with pytest.raises(ShapeMismatch, match="expected a matrix") as caught:
        arrays.check_matrix("basis", np.ones(shape), rows=rows, columns=columns)
    assert str(shape) in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (0.0, ValueOutOfRange),
        (-1.0, ValueOutOfRange),
        (1e-61, ValueOutOfRange),
        (1e61, ValueOutOfRange),
        (np.nan, NonFiniteValue),
        (np.inf, NonFiniteValue),
    ],
)
def test_scalars_must_be_positive_and_moderate(number, error):
    with pytest.raises(error, match="weight"):
        arrays.check_positive("weight", number)


def test_positive_scalar_passes():
    assert arrays.check_positive("weight", 3) == 3.0


@pytest.mark.parametrize(("rank", "limit"), [(0, 4), (-1, 4), (5, 4)])
def test_impossible_rank(rank, limit):
    with pytest.raises(RankMismatch, match=f"between 1 and {limit}, got {rank}"):
        arrays.check_rank(rank, limit)


@pytest.mark.parametrize(("items", "others"), [([], []), ([1], []), ([1], [1, 2])])
def test_pairs_must_match(items, others):
    with pytest.raises(ShapeMismatch, match="as many factors as weights"):
        arrays.check_same_length("factors", items, "weights", others)


@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 5), columns=st.integers(1, 7))
def test_row_signs_make_the_largest_entry_positive(seed, rows, columns):
    matrix = np.random.default_rng(seed).standard_normal((rows, columns))
    signed = matrix * arrays.row_signs(matrix)[:, None]
    np.testing.assert_array_equal(np.max(signed, axis=1), np.max(np.abs(matrix), axis=1))


def test_row_signs_of_zeros_and_ties():
    np.testing.assert_array_equal(arrays.row_signs(np.array([[0.0, 0.0], [-2.0, 2.0], [2.0, -2.0]])), [1.0, -1.0, 1.0])
