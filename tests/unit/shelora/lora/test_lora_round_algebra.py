"""A whole round's algebra without a network: any ranks, any budgets, a member that drops out, the wire's float32."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shelora.lora import (
    BasisSketch,
    Factors,
    average,
    basis,
    canonical,
    cipher_part,
    plain_part,
    plaintext_average,
    project,
    reparameterize,
)

FLOAT32_UNIT = 2.0**-24


@dataclass(frozen=True)
class Cohort:
    members: list[Factors]
    weights: list[float]
    hidden: list[int]
    order: np.ndarray
    counted: list[int]

    @property
    def shape(self):
        return self.members[0].left.shape[0], self.members[0].right.shape[1]

    @property
    def rank_sum(self):
        return sum(member.rank for member in self.members)

    def oracle(self):
        return plaintext_average(
            [self.members[index] for index in self.counted], [self.weights[index] for index in self.counted]
        )


@st.composite
def cohorts(draw, smallest_m=1):
    m, n = draw(st.integers(smallest_m, 24)), draw(st.integers(1, 24))
    count = draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    members = []
    for _ in range(count):
        rank = draw(st.integers(1, min(m, n, 8)))
        b, a = rng.standard_normal((m, rank)), rng.standard_normal((rank, n))
        members.append(canonical(b, a, draw(st.floats(0.1, 4.0))))
    examples = [draw(st.integers(1, 1000)) for _ in range(count)]
    lost = draw(st.integers(0, count)) if count > 1 else count
    return Cohort(
        members=members,
        weights=[number / sum(examples) for number in examples],
        hidden=[draw(st.integers(0, n)) for _ in range(count)],
        order=rng.permutation(n),
        counted=[index for index in range(count) if index != lost],
    )


def exact(array):
    return array


def through_float32(array):
    return array.astype(np.float32).astype(np.float64)


def run_round(cohort, directions, wire=exact):
    """Both parts summed over the members that count, opened, and put back into true column order.

    Sums of residues are exact, so the sum of zero-padded arrays stands for decrypting the sum of ciphertexts here.
    """
    n = cohort.shape[1]
    published = wire(directions)
    plain = np.zeros((published.shape[1], n))
    opened = np.zeros((published.shape[1], max(cohort.hidden[index] for index in cohort.counted)))
    for index in cohort.counted:
        member, weight, hidden = cohort.members[index], cohort.weights[index], cohort.hidden[index]
        right = member.right[:, cohort.order]
        projection = project(published, wire(member.left))
        plain += plain_part(projection, wire(right[:, hidden:]), weight, n)
        opened[:, :hidden] += cipher_part(wire(projection), right[:, :hidden], weight)
    core = average(wire(plain), opened, sum(cohort.weights[index] for index in cohort.counted))
    restored = np.empty_like(core)
    restored[:, cohort.order] = core
    return published, restored


@given(cohorts())
@settings(max_examples=200, deadline=None)
def test_average_equals_plaintext_average_when_the_cap_holds_all_ranks(cohort):
    directions = basis([member.left for member in cohort.members], cohort.weights, cohort.rank_sum)
    published, core = run_round(cohort, directions)
    np.testing.assert_allclose(published @ core, cohort.oracle(), rtol=0, atol=1e-10)


@given(cohorts())
@settings(max_examples=100, deadline=None)
def test_streaming_basis_gives_the_same_average(cohort):
    sketch = BasisSketch(cohort.shape[0], cohort.rank_sum)
    for member, weight in zip(cohort.members, cohort.weights, strict=True):
        sketch.add(member.left, weight)
    published, core = run_round(cohort, sketch.basis())
    np.testing.assert_allclose(published @ core, cohort.oracle(), rtol=0, atol=1e-10)


@given(cohorts(smallest_m=4), st.integers(1, 8))
@settings(max_examples=150, deadline=None)
def test_truncation_error_stays_within_the_documented_bound(cohort, cap):
    everyone = Cohort(
        cohort.members, cohort.weights, cohort.hidden, cohort.order, counted=list(range(len(cohort.members)))
    )
    directions = basis([member.left for member in everyone.members], everyone.weights, cap)
    published, core = run_round(everyone, directions)
    stacked = np.concatenate(
        [weight * member.left for member, weight in zip(everyone.members, everyone.weights, strict=True)], axis=1
    )
    tail = np.linalg.svd(stacked, compute_uv=False)[directions.shape[1] :]
    bound = np.sqrt(len(everyone.members)) * np.linalg.norm(tail)
    assert np.linalg.norm(published @ core - everyone.oracle()) <= bound + 1e-10


@given(cohorts())
@settings(max_examples=150, deadline=None)
def test_float32_on_the_wire_stays_within_the_documented_bound(cohort):
    directions = basis([member.left for member in cohort.members], cohort.weights, cohort.rank_sum)
    published, core = run_round(cohort, directions, through_float32)
    total = sum(cohort.weights[index] for index in cohort.counted)
    energy = sum(cohort.weights[index] * np.linalg.norm(cohort.members[index].left) for index in cohort.counted) / total
    bound = FLOAT32_UNIT * (2 * np.sqrt(directions.shape[1]) + 4) * energy
    assert np.linalg.norm(published @ core - cohort.oracle()) <= 1.01 * bound + 1e-12


def test_dropout_leaves_no_trace_in_either_part():
    rng = np.random.default_rng(11)
    members = [canonical(rng.standard_normal((30, r)), rng.standard_normal((r, 22)), 16 / r) for r in (4, 8, 16)]
    order, weights, hidden = rng.permutation(22), [0.5, 0.2, 0.3], [22, 5, 11]
    everyone = Cohort(members, weights, hidden, order, counted=[0, 1, 2])
    without = Cohort(members, weights, hidden, order, counted=[0, 2])
    directions = basis([member.left for member in members], weights, 28)
    published, core = run_round(without, directions)
    oracle = (0.5 * members[0].left @ members[0].right + 0.3 * members[2].left @ members[2].right) / 0.8
    np.testing.assert_allclose(published @ core, oracle, rtol=0, atol=1e-10)
    assert np.max(np.abs(published @ core - everyone.oracle())) > 0.1


@pytest.mark.parametrize("rank", [2, 4, 8])
def test_every_agent_gets_the_best_fit_of_its_own_rank(rank):
    rng = np.random.default_rng(12)
    members = [canonical(rng.standard_normal((30, r)), rng.standard_normal((r, 22)), 16 / r) for r in (2, 4, 8)]
    cohort = Cohort(members, [0.25, 0.25, 0.5], [0, 22, 7], rng.permutation(22), counted=[0, 1, 2])
    published, core = run_round(cohort, basis([member.left for member in members], cohort.weights, 14))
    adapter = reparameterize(published, core, rank, 16 / rank, np.ones((rank, 22)))
    u, s, vt = np.linalg.svd(cohort.oracle(), full_matrices=False)
    np.testing.assert_allclose(
        16 / rank * adapter.b @ adapter.a, (u[:, :rank] * s[:rank]) @ vt[:rank], rtol=0, atol=1e-10
    )


def test_an_average_taken_again_without_training_is_a_fixed_point():
    rng = np.random.default_rng(13)
    member = canonical(rng.standard_normal((20, 4)), rng.standard_normal((4, 15)), 2.0)
    published, core = run_round(
        Cohort([member], [1.0], [6], rng.permutation(15), counted=[0]), basis([member.left], [1.0], 16)
    )
    adapter = reparameterize(published, core, 4, 4.0, np.ones((4, 15)))
    again = canonical(adapter.b, adapter.a, 4.0)
    np.testing.assert_allclose(again.left, member.left, rtol=0, atol=1e-12)
    np.testing.assert_allclose(again.right, member.right, rtol=0, atol=1e-12)
