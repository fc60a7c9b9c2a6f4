from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shelora.errors import NonFiniteValue, RankMismatch, ShapeMismatch, ValueOutOfRange
from shelora.lora import Adapter, canonical, initial_adapter, pad_rank, reparameterize, truncate


@st.composite
def averages(draw):
    """A basis, a core of full or lower rank, and a rank below, at or above the number of basis columns."""
    m, n = draw(st.integers(1, 16)), draw(st.integers(1, 16))
    rows = draw(st.integers(1, m))
    rank = draw(st.integers(1, min(m, n)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    directions = np.linalg.qr(rng.standard_normal((m, rows)))[0]
    inner = draw(st.integers(0, min(rows, n)))
    core = rng.standard_normal((rows, inner)) @ rng.standard_normal((inner, n)) * 10.0 ** draw(st.integers(-6, 6))
    return directions, core, rank, draw(st.floats(0.01, 100.0)), rng.uniform(-1, 1, (rank + draw(st.integers(0, 2)), n))


@given(averages())
@settings(max_examples=200)
def test_best_fit_balanced_and_fresh_rows_for_missing_directions(case):
    directions, core, rank, scaling, fresh = case
    adapter = reparameterize(directions, core, rank, scaling, fresh)
    u, s, vt = np.linalg.svd(directions @ core, full_matrices=False)
    size = max(float(s[0]), 1e-300)
    assert adapter.rank == rank
    best = (u[:, :rank] * s[:rank]) @ vt[:rank]
    fitted = scaling * adapter.b @ adapter.a
    # A tie between singular values leaves the best fit open, its error never.
    error = np.linalg.norm(directions @ core - fitted)
    assert abs(error - np.linalg.norm(directions @ core - best)) <= 1e-11 * size
    present = int(np.count_nonzero(np.any(adapter.b != 0.0, axis=0)))
    assert present <= min(rank, np.count_nonzero(s > 1e-13 * size))
    assert present >= min(rank, np.count_nonzero(s > 1e-11 * size))
    np.testing.assert_array_equal(adapter.a[present:], fresh[present:rank])
    b, a = adapter.b[:, :present], adapter.a[:present]
    np.testing.assert_allclose(scaling * b.T @ b, np.diag(s[:present]), rtol=0, atol=1e-11 * size)
    np.testing.assert_allclose(scaling * a @ a.T, np.diag(s[:present]), rtol=0, atol=1e-11 * size)
    np.testing.assert_array_equal(np.max(a, axis=1), np.max(np.abs(a), axis=1))


def test_fresh_rows_are_drawn_only_for_missing_directions():
    rng = np.random.default_rng(2)
    core = rng.normal(size=(2, 5))
    fresh = rng.uniform(-1, 1, (3, 5))
    asked = []

    def draw():
        asked.append(True)
        return fresh

    directions = np.eye(6)[:, :2]
    whole = reparameterize(directions, core, 2, 2.0, draw)
    assert not asked
    np.testing.assert_array_equal(whole.a, reparameterize(directions, core, 2, 2.0, fresh).a)
    lacking = reparameterize(directions, core, 3, 2.0, draw)
    assert asked == [True]
    np.testing.assert_array_equal(lacking.a[2], fresh[2])


def test_zero_core_gives_the_initial_adapter():
    fresh = np.random.default_rng(1).uniform(-1, 1, (3, 5))
    adapter = reparameterize(np.eye(6)[:, :2], np.zeros((2, 5)), 3, 2.0, fresh)
    start = initial_adapter(3, 6, fresh)
    np.testing.assert_array_equal(adapter.b, start.b)
    np.testing.assert_array_equal(adapter.a, start.a)


def test_missing_threshold_can_follow_the_precision_of_the_input():
    directions = np.eye(4)[:, :3]
    core = np.diag([1.0, 1e-3, 1e-8]) @ np.eye(3, 5)
    fresh = np.full((3, 5), 0.25)
    strict = reparameterize(directions, core, 3, 1.0, fresh)
    coarse = reparameterize(directions, core, 3, 1.0, fresh, missing=1e-6)
    assert np.linalg.matrix_rank(strict.b, tol=1e-9) == 3
    np.testing.assert_array_equal(coarse.a[2], fresh[2])
    assert not coarse.b[:, 2].any()
    np.testing.assert_array_equal(coarse.b[:, :2], strict.b[:, :2])


def test_returned_arrays_are_the_agents_own():
    fresh = np.ones((2, 4))
    for adapter in (
        initial_adapter(2, 3, fresh),
        reparameterize(np.eye(3), np.zeros((3, 4)), 2, 1.0, fresh),
    ):
        adapter.a[:] = 9.0
    np.testing.assert_array_equal(fresh, np.ones((2, 4)))


def test_initial_adapter_takes_the_first_rows_of_a_larger_rank():
    fresh = np.arange(20.0).reshape(4, 5)
    small, large = initial_adapter(2, 6, fresh), initial_adapter(4, 6, fresh)
    np.testing.assert_array_equal(small.a, large.a[:2])
    assert small.b.shape == (6, 2)
    assert not small.b.any()


def test_truncate_keeps_the_strongest_directions():
    rng = np.random.default_rng(2)
    core = rng.standard_normal((4, 7))
    directions = np.linalg.qr(rng.standard_normal((6, 4)))[0]
    fresh = np.ones((4, 7))
    whole = reparameterize(directions, core, 4, 2.0, fresh)
    cut, direct = truncate(whole, 2), reparameterize(directions, core, 2, 2.0, fresh)
    np.testing.assert_allclose(cut.b, direct.b, rtol=0, atol=1e-14)
    np.testing.assert_allclose(cut.a, direct.a, rtol=0, atol=1e-14)
    kept = whole.b.copy(), whole.a.copy()
    cut.b[:] = 0.0
    cut.a[:] = 0.0
    np.testing.assert_array_equal(whole.b, kept[0])
    np.testing.assert_array_equal(whole.a, kept[1])


@given(seed=st.integers(0, 2**32 - 1), rank=st.integers(1, 3), extra=st.integers(0, 3))
def test_padding_changes_neither_the_product_nor_the_canonical_energy(seed, rank, extra):
    rng = np.random.default_rng(seed)
    b, a = rng.standard_normal((8, rank)), rng.standard_normal((rank, 7))
    padded_b, padded_a = pad_rank(b, a, rank + extra)
    assert padded_b.shape == (8, rank + extra)
    assert padded_a.shape == (rank + extra, 7)
    np.testing.assert_array_equal(padded_b[:, :rank], b)
    np.testing.assert_array_equal(padded_a[:rank], a)
    assert not padded_b[:, rank:].any()
    assert not padded_a[rank:].any()
    plain, padded = canonical(b, a, 2.0), canonical(padded_b, padded_a, 2.0)
    np.testing.assert_allclose(padded.left @ padded.right, plain.left @ plain.right, rtol=0, atol=1e-12)


def test_adapter_must_multiply():
    with pytest.raises(RankMismatch, match=r"\(3, 2\) and \(1, 4\)"):
        Adapter(np.ones((3, 2)), np.ones((1, 4)))


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: initial_adapter(0, 3, np.ones((2, 4))), RankMismatch),
        (lambda: initial_adapter(4, 3, np.ones((4, 4))), RankMismatch),
        (lambda: initial_adapter(3, 3, np.ones((2, 4))), ShapeMismatch),
        (lambda: initial_adapter(1, 3, np.full((1, 4), np.nan)), NonFiniteValue),
        (lambda: reparameterize(np.eye(3), np.ones((2, 4)), 1, 1.0, np.ones((1, 4))), ShapeMismatch),
        (lambda: reparameterize(np.eye(3), np.ones((3, 4)), 4, 1.0, np.ones((4, 4))), RankMismatch),
        (lambda: reparameterize(np.eye(3), np.ones((3, 4)), 0, 1.0, np.ones((4, 4))), RankMismatch),
        (lambda: reparameterize(np.eye(3), np.ones((3, 4)), 2, 0.0, np.ones((2, 4))), ValueOutOfRange),
        (lambda: reparameterize(np.eye(3), np.ones((3, 4)), 2, 1.0, np.ones((1, 4))), ShapeMismatch),
        (lambda: reparameterize(np.eye(3), np.ones((3, 4)), 2, 1.0, np.ones((2, 5))), ShapeMismatch),
        (lambda: reparameterize(np.eye(3), np.full((3, 4), np.nan), 2, 1.0, np.ones((2, 4))), NonFiniteValue),
        (lambda: truncate(Adapter(np.ones((3, 2)), np.ones((2, 4))), 3), RankMismatch),
        (lambda: truncate(Adapter(np.ones((3, 2)), np.ones((2, 4))), 0), RankMismatch),
        (lambda: pad_rank(np.ones((3, 2)), np.ones((1, 4)), 3), ShapeMismatch),
        (lambda: pad_rank(np.ones((3, 2)), np.ones((2, 4)), 1), RankMismatch),
        (lambda: pad_rank(np.ones((3, 2)), np.ones((2, 4)), 4), RankMismatch),
    ],
)
def test_refusals(call, error):
    with pytest.raises(error):
        call()
