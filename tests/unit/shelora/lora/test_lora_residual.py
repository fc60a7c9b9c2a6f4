"""Trained rank and sent rank: nothing is lost between an average, its parts, and what is sent back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shelora.errors import NonFiniteValue, RankMismatch, ShapeMismatch, ValueOutOfRange
from shelora.lora import Adapter, Factors, basis, canonical, join, plaintext_average, reparameterize, split

BOUND = 1e-11


def product(factors: Factors) -> np.ndarray:
    return factors.left @ factors.right


def best(matrix: np.ndarray, rank: int) -> np.ndarray:
    left, energy, right = np.linalg.svd(matrix, full_matrices=False)
    return (left[:, :rank] * energy[:rank]) @ right[:rank]


@st.composite
def states(draw):
    """A trained adapter, a residual of any rank (none, and more than fits, included), a scaling and a sent rank."""
    m, n = draw(st.integers(1, 14)), draw(st.integers(1, 14))
    rank = draw(st.integers(1, min(m, n)))
    sent = draw(st.integers(rank, min(m, n)))
    rest = draw(st.integers(0, min(m, n)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    adapter = Adapter(rng.normal(size=(m, rank)), rng.normal(size=(rank, n)))
    residual = Factors(rng.normal(size=(m, rest)), rng.normal(size=(rest, n))) if draw(st.booleans()) else None
    return adapter, draw(st.floats(0.01, 10.0)), residual, sent


@given(states())
@settings(max_examples=200)
def test_a_contribution_is_the_whole_state_or_its_best_cut(case):
    adapter, scaling, residual, sent = case
    whole = scaling * adapter.b @ adapter.a + (0.0 if residual is None else product(residual))
    directions = adapter.rank + (0 if residual is None else residual.rank)
    found = join(adapter, scaling, residual, sent)
    size = max(1.0, float(np.linalg.norm(whole)))
    assert (found.left.shape, found.right.shape) == ((whole.shape[0], sent), (sent, whole.shape[1]))
    if directions <= sent:
        np.testing.assert_allclose(product(found), whole, atol=BOUND * size)
    # A tie between singular values leaves the best fit open, its error never.
    error = np.linalg.norm(whole - product(found))
    assert abs(error - np.linalg.norm(whole - best(whole, sent))) <= BOUND * size
    there = min(directions, sent)
    np.testing.assert_allclose(found.right[:there] @ found.right[:there].T, np.eye(there), atol=BOUND)
    gram = found.left.T @ found.left
    np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=BOUND * size**2)
    assert not found.left[:, there:].any()
    assert not found.right[there:].any()


@given(states())
def test_without_a_residual_at_its_own_rank_an_adapter_has_the_factors_it_always_had(case):
    adapter, scaling, _, _ = case
    usual, found = canonical(adapter.b, adapter.a, scaling), join(adapter, scaling, None, adapter.rank)
    np.testing.assert_allclose(found.left, usual.left, atol=BOUND * max(1.0, float(np.abs(usual.left).max())))
    np.testing.assert_allclose(product(found), product(usual), atol=BOUND * max(1.0, float(np.abs(usual.left).max())))


@st.composite
def averages(draw):
    """A basis, a core of full or lower rank, a trained rank and a sent rank."""
    m, n = draw(st.integers(1, 14)), draw(st.integers(1, 14))
    rows = draw(st.integers(1, m))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    inner = draw(st.integers(0, min(rows, n)))
    core = rng.normal(size=(rows, inner)) @ rng.normal(size=(inner, n))
    sent = draw(st.integers(1, min(m, n)))
    directions = np.linalg.qr(rng.normal(size=(m, rows)))[0]
    fresh = rng.uniform(-1, 1, (sent, n))
    return directions, core, draw(st.integers(1, sent)), sent, draw(st.floats(0.01, 10.0)), fresh


@given(averages())
@settings(max_examples=200)
def test_fit_and_residual_are_the_cut_of_the_sent_rank_and_untrained_come_back_as_it(case):
    directions, core, rank, sent, scaling, fresh = case
    total = directions @ core
    size = max(1.0, float(np.linalg.norm(total)))
    fit, residual = split(reparameterize(directions, core, sent, scaling, fresh), rank, scaling)
    usual = reparameterize(directions, core, rank, scaling, fresh)
    np.testing.assert_allclose(fit.b, usual.b, atol=BOUND * size)
    np.testing.assert_allclose(fit.a, usual.a, atol=BOUND * size)
    assert residual.rank <= sent - rank
    held = scaling * fit.b @ fit.a + product(residual)
    kept = np.linalg.norm(total - best(total, sent))
    assert abs(np.linalg.norm(total - held) - kept) <= BOUND * size
    back = product(join(fit, scaling, residual, sent))
    np.testing.assert_allclose(back, held, atol=BOUND * size)


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 5), min_size=2, max_size=4))
def test_agents_that_train_nothing_give_the_average_back(entropy, ranks):
    """The fixed point: with sent ranks that hold it, the next average is the last one, whatever the trained ranks."""
    rng = np.random.default_rng(entropy)
    m, n, sent = 16, 18, 6
    total = rng.normal(size=(m, sent)) @ rng.normal(size=(sent, n))
    directions = np.linalg.qr(total)[0]
    weights = rng.uniform(0.1, 1.0, len(ranks)).tolist()
    contributions = []
    for rank in ranks:
        scaling = float(rng.uniform(0.1, 3.0))
        fitted = reparameterize(directions, directions.T @ total, sent, scaling, np.zeros((sent, n)))
        contributions.append(join(*_parted(fitted, rank, scaling), sent))
    found = plaintext_average(contributions, weights)
    np.testing.assert_allclose(found, total, atol=BOUND * float(np.linalg.norm(total)))
    common = basis([one.left for one in contributions], weights, sum(ranks) + sent)
    np.testing.assert_allclose(common @ (common.T @ found), total, atol=BOUND * float(np.linalg.norm(total)))


def _parted(fitted: Adapter, rank: int, scaling: float) -> tuple[Adapter, float, Factors]:
    fit, residual = split(fitted, rank, scaling)
    return fit, scaling, residual


@given(states(), states())
def test_the_average_of_contributions_is_the_total_of_what_was_added(case, other):
    """With an exact basis: whole states average to what the residual and the trained parts average to."""
    adapter, scaling, residual, sent = case
    m, n = adapter.b.shape[0], adapter.a.shape[1]
    rng = np.random.default_rng(other[3])
    second = Adapter(rng.normal(size=(m, adapter.rank)), rng.normal(size=(adapter.rank, n)))
    held = Factors(np.zeros((m, 0)), np.zeros((0, n))) if residual is None else residual
    held = Factors(held.left[:, : sent - adapter.rank], held.right[: sent - adapter.rank])
    contributions = [join(one, scaling, held, sent) for one in (adapter, second)]
    found = plaintext_average(contributions, [3.0, 1.0])
    true = product(held) + scaling * (0.75 * adapter.b @ adapter.a + 0.25 * second.b @ second.a)
    np.testing.assert_allclose(found, true, atol=BOUND * max(1.0, float(np.linalg.norm(true))))


def test_what_does_not_fit_is_refused():
    adapter = Adapter(np.ones((5, 2)), np.ones((2, 4)))
    residual = Factors(np.ones((5, 1)), np.ones((1, 4)))
    with pytest.raises(RankMismatch, match="between 1 and 4, got 5"):
        join(adapter, 1.0, residual, 5)
    with pytest.raises(RankMismatch):
        split(adapter, 3, 1.0)
    with pytest.raises(ShapeMismatch, match="residual's left factor"):
        join(adapter, 1.0, Factors(np.ones((6, 1)), np.ones((1, 4))), 3)
    with pytest.raises(ShapeMismatch, match="residual's right factor"):
        join(adapter, 1.0, Factors(np.ones((5, 1)), np.ones((1, 3))), 3)
    with pytest.raises(NonFiniteValue):
        join(adapter, 1.0, Factors(np.full((5, 1), np.nan), np.ones((1, 4))), 3)
    with pytest.raises(ValueOutOfRange):
        join(adapter, 0.0, residual, 3)
    with pytest.raises(ValueOutOfRange):
        split(adapter, 1, -1.0)
