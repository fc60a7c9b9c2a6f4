from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shelora.errors import InvalidPlan, ShapeMismatch
from shelora.plan import FederationSeed, apply, invert, undo, wire_order

SEED = FederationSeed(bytes(range(32)))


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, np.ndarray, list[int]]:
    n = draw(st.integers(1, 40))
    priority = np.array(draw(st.permutations(range(n))), dtype=np.int64)
    return n, priority, draw(st.lists(st.integers(0, n), max_size=4))


@given(cases())
def test_is_a_permutation_in_which_every_level_encrypts_its_most_sensitive_columns(
    case: tuple[int, np.ndarray, list[int]],
) -> None:
    n, priority, levels = case
    order = wire_order(SEED, "fed", 1, 0, "m", n, priority, levels)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(n))
    for k in levels:
        assert set(order[:k].tolist()) == set(priority[:k].tolist())


@given(cases())
def test_order_and_repetition_of_levels_do_not_matter(case: tuple[int, np.ndarray, list[int]]) -> None:
    n, priority, levels = case
    order = wire_order(SEED, "fed", 1, 0, "m", n, priority, levels)
    assert np.array_equal(order, wire_order(SEED, "fed", 1, 0, "m", n, priority, [*levels[::-1], *levels]))


def test_differs_by_every_label() -> None:
    priority = np.arange(60)
    variants = [
        wire_order(SEED, "fed", 1, 0, "m", 60, priority, (60,)),
        wire_order(FederationSeed(bytes(32)), "fed", 1, 0, "m", 60, priority, (60,)),
        wire_order(SEED, "other", 1, 0, "m", 60, priority, (60,)),
        wire_order(SEED, "fed", 2, 0, "m", 60, priority, (60,)),
        wire_order(SEED, "fed", 1, 1, "m", 60, priority, (60,)),
        wire_order(SEED, "fed", 1, 0, "n", 60, priority, (60,)),
    ]
    assert len({order.tobytes() for order in variants}) == len(variants)


def test_no_segment_keeps_the_priority_order_over_many_rounds_and_modules() -> None:
    """The most sensitive column is found at every place of its segment, about equally often."""
    counts = np.zeros(10)
    for round_number in range(100):
        for module in ("a", "b", "c", "d", "e"):
            order = wire_order(SEED, "fed", 1, round_number, module, 30, np.arange(30), (10,))
            counts[order.tolist().index(0)] += 1
    assert counts.sum() == 500
    assert np.abs(counts - 50).max() < 5 * np.sqrt(45)


def test_is_frozen() -> None:
    order = wire_order(SEED, "fed", 2, 5, "layer.0.query", 12, np.arange(12)[::-1].copy(), (3, 7))
    assert order.tolist() == [10, 11, 9, 8, 5, 6, 7, 2, 4, 1, 3, 0]


@pytest.mark.parametrize("priority", [[0, 1], [0, 1, 2, 3]])
def test_priority_of_another_length_is_refused(priority: list[int]) -> None:
    with pytest.raises(ShapeMismatch):
        wire_order(SEED, "fed", 1, 0, "m", 3, np.array(priority), ())


@pytest.mark.parametrize("priority", [[0, 1, 1], [1, 2, 3], [-1, 0, 1]])
def test_priority_that_is_no_permutation_is_refused(priority: list[int]) -> None:
    with pytest.raises(InvalidPlan):
        wire_order(SEED, "fed", 1, 0, "m", 3, np.array(priority), ())


@pytest.mark.parametrize("levels", [(-1,), (4,)])
def test_levels_out_of_range_are_refused(levels: tuple[int, ...]) -> None:
    with pytest.raises(InvalidPlan, match="between 0 and 3"):
        wire_order(SEED, "fed", 1, 0, "m", 3, np.arange(3), levels)


@given(cases(), st.integers(1, 3))
def test_undo_is_the_inverse_of_apply(case: tuple[int, np.ndarray, list[int]], rows: int) -> None:
    n, order, _ = case
    matrix = np.arange(rows * n, dtype=np.float64).reshape(rows, n)
    sent = apply(order, matrix)
    for position in range(n):
        assert np.array_equal(sent[:, position], matrix[:, order[position]])
    assert np.array_equal(undo(order, sent), matrix)
    assert np.array_equal(apply(order, undo(order, matrix)), matrix)
    assert np.array_equal(order[invert(order)], np.arange(n))
    assert not np.shares_memory(sent, matrix)


def test_matrices_of_another_width_are_refused() -> None:
    for function in (apply, undo):
        for shape in ((2, 4), (3,)):
            with pytest.raises(ShapeMismatch):
                function(np.arange(3), np.zeros(shape))


def test_invert_refuses_what_is_no_permutation() -> None:
    for order in (np.array([0, 0, 1]), np.zeros((2, 2), dtype=np.int64)):
        with pytest.raises(InvalidPlan):
            invert(order)
