"""What docs/method.md states in figures: section 8 on cohorts larger than the cap, section 9 on hidden columns."""

from __future__ import annotations

import numpy as np
import pytest

from shelora.lora import BasisSketch, basis, canonical, plain_part, plaintext_average, project, reparameterize

M, N = 120, 96
RANKS = ([4, 8, 16] * 7)[:20]
LARGEST = 16


def correlated_agents(rng, deviation):
    """Twenty agents that share an update of falling spectrum; each adds its own deviation and fits its own rank.

    deviation: Frobenius norm of the own part over that of the shared update.
    """
    falling = 0.7 ** np.arange(LARGEST)

    def random_update():
        outputs = np.linalg.qr(rng.standard_normal((M, LARGEST)))[0]
        inputs = np.linalg.qr(rng.standard_normal((N, LARGEST)))[0]
        return (outputs * falling) @ inputs.T

    shared = random_update()
    agents = []
    for rank in RANKS:
        u, s, vt = np.linalg.svd(shared + deviation * random_update(), full_matrices=False)
        agents.append(canonical(u[:, :rank], s[:rank, None] * vt[:rank], 1.0))
    examples = rng.integers(50, 500, len(RANKS))
    return agents, list(examples / examples.sum())


def core_in(directions, agents, weights):
    return sum(
        plain_part(project(directions, agent.left), agent.right, weight, N)
        for agent, weight in zip(agents, weights, strict=True)
    )


def excess_over_best(directions, agents, weights, rank):
    """Error of the rank-r fit against the full average over that of the best rank-r matrix, minus one."""
    full = plaintext_average(agents, weights)
    adapter = reparameterize(directions, core_in(directions, agents, weights), rank, 2.0, np.ones((rank, N)))
    best = np.linalg.norm(np.linalg.svd(full, compute_uv=False)[rank:])
    return float(np.linalg.norm(full - 2.0 * adapter.b @ adapter.a) / best - 1.0)


def sketch_basis(agents, weights, cap):
    sketch = BasisSketch(M, cap)
    for agent, weight in zip(agents, weights, strict=True):
        sketch.add(agent.left, weight)
    return sketch.basis()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("multiple", [2, 3, 4])
def test_closely_correlated_agents_lose_at_most_two_percent(seed, multiple):
    agents, weights = correlated_agents(np.random.default_rng(seed), 0.1)
    cap = multiple * LARGEST
    for directions in (basis([agent.left for agent in agents], weights, cap), sketch_basis(agents, weights, cap)):
        for rank in (4, 8, 16):
            assert -1e-9 <= excess_over_best(directions, agents, weights, rank) <= 0.02


@pytest.mark.parametrize("deviation", [0.3, 0.6, 1.0])
@pytest.mark.parametrize(
    ("multiple", "allowed"), [(2, (0.01, 0.02, 0.07)), (3, (0.002, 0.005, 0.02)), (4, (0.0005, 0.001, 0.005))]
)
def test_loosely_correlated_agents_lose_little_and_least_at_the_default_cap(deviation, multiple, allowed):
    agents, weights = correlated_agents(np.random.default_rng(7), deviation)
    directions = sketch_basis(agents, weights, multiple * LARGEST)
    for rank, limit in zip((4, 8, 16), allowed, strict=True):
        assert -1e-9 <= excess_over_best(directions, agents, weights, rank) <= limit


@pytest.mark.parametrize("deviation", [0.1, 0.6])
@pytest.mark.parametrize("multiple", [2, 3, 4])
def test_streaming_loses_no_more_than_the_batch(deviation, multiple):
    agents, weights = correlated_agents(np.random.default_rng(8), deviation)
    cap = multiple * LARGEST
    stacked = np.concatenate([w * agent.left for agent, w in zip(agents, weights, strict=True)], axis=1)
    lost = [
        np.linalg.norm(stacked - directions @ (directions.T @ stacked))
        for directions in (sketch_basis(agents, weights, cap), basis([a.left for a in agents], weights, cap))
    ]
    assert lost[1] <= lost[0] * (1 + 1e-9)
    assert lost[0] <= 1.02 * lost[1]


def test_merging_partial_sketches_loses_no_more_than_the_batch():
    agents, weights = correlated_agents(np.random.default_rng(9), 0.3)
    cap = 4 * LARGEST
    stacked = np.concatenate([w * agent.left for agent, w in zip(agents, weights, strict=True)], axis=1)
    partial = []
    for start in range(0, 20, 5):
        sketch = BasisSketch(M, cap)
        for agent, weight in zip(agents[start : start + 5], weights[start : start + 5], strict=True):
            sketch.add(agent.left, weight)
        partial.append(sketch)
    merged = partial[0].merge(partial[1]).merge(partial[2].merge(partial[3])).basis()
    batch = basis([agent.left for agent in agents], weights, cap)
    lost = [np.linalg.norm(stacked - u @ (u.T @ stacked)) for u in (merged, batch)]
    assert lost[0] <= 1.02 * lost[1]


def test_nothing_is_lost_when_the_cap_holds_the_sum_of_ranks():
    agents, weights = correlated_agents(np.random.default_rng(10), 0.5)
    few, shares = agents[:6], [weight / sum(weights[:6]) for weight in weights[:6]]
    cap = sum(agent.rank for agent in few)
    full = plaintext_average(few, shares)
    for directions in (basis([agent.left for agent in few], shares, cap), sketch_basis(few, shares, cap)):
        assert np.max(np.abs(directions @ core_in(directions, few, shares) - full)) <= 1e-12


def test_plain_columns_give_away_the_gram_matrix_of_hidden_ones():
    rng = np.random.default_rng(14)
    right = canonical(rng.standard_normal((M, 4)), rng.standard_normal((4, N)), 1.0).right
    for hidden in (1, 10):
        gram = np.eye(4) - right[:, hidden:] @ right[:, hidden:].T
        np.testing.assert_allclose(gram, right[:, :hidden] @ right[:, :hidden].T, rtol=0, atol=1e-12)
    energy, directions = np.linalg.eigh(np.eye(4) - right[:, 1:] @ right[:, 1:].T)
    guess = directions[:, -1] * np.sqrt(energy[-1])
    np.testing.assert_allclose(guess * np.sign(guess[0] * right[0, 0]), right[:, 0], rtol=0, atol=1e-7)
