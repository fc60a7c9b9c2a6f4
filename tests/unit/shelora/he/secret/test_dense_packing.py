"""Two integers in each real number, through the real library: encrypt, add residues, decrypt, take apart."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shelora.he import add_residues
from shelora.he.secret import Decryptor, Encryptor
from shelora.plan import MAX_DENSE_AGENTS, Packing, check_packing
from shelora.plan.packing import LARGEST_INTEGER, PAIR_UNIT, join_pairs, split_pairs

N = 4096
LARGEST_SUM = LARGEST_INTEGER + MAX_DENSE_AGENTS // 2


def open_sum(encryptor: Encryptor, decryptor: Decryptor, terms: np.ndarray, repeat: int = 1) -> np.ndarray:
    """Encrypt every row of integers `repeat` times, add all of it up, take it apart."""
    count = -(-terms.shape[1] // 2)
    blocks = encryptor.parameters.blocks_for(count)
    total = np.zeros((blocks, 2, N), dtype=np.uint64)
    for row in terms:
        reals = np.zeros(blocks * N)
        reals[:count] = join_pairs(row, 0)
        for term in encryptor.encrypt(np.tile(reals, repeat)).reshape(repeat, blocks, 2, N):
            add_residues(total, term, encryptor.parameters.modulus)
    return split_pairs(decryptor.decrypt(total, count), 0)[: terms.shape[1]]


def assert_sums(found: np.ndarray, terms: np.ndarray, ciphertexts: int, encryptor: Encryptor, repeat: int = 1) -> None:
    exact = terms.sum(axis=0) * repeat
    assert np.array_equal(found[::2], exact[::2])
    noise = encryptor.parameters.error_bound(ciphertexts) / PAIR_UNIT
    assert np.abs(found[1::2] - exact[1::2]).max(initial=0.0) <= noise + 0.5


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 64), st.integers(1, 2 * N + 3), st.integers(0, 2**32 - 1))
def test_sums_of_up_to_64_ciphertexts(
    encryptor: Encryptor, decryptor: Decryptor, agents: int, count: int, seed: int
) -> None:
    """Signs at random, so high and low halves cancel, carry and borrow in every way."""
    each = LARGEST_SUM // agents
    terms = np.random.default_rng(seed).integers(-each, each, (agents, count), endpoint=True).astype(np.float64)
    assert_sums(open_sum(encryptor, decryptor, terms), terms, agents, encryptor)


@pytest.mark.parametrize("pattern", [(1, 1), (1, -1), (-1, 1), (-1, -1), (1, -1, -1, 1), (1, 0), (0, -1)])
@pytest.mark.parametrize("agents", [2, 64])
def test_sums_at_the_edge_of_the_range(
    encryptor: Encryptor, decryptor: Decryptor, agents: int, pattern: tuple[int, ...]
) -> None:
    """Every half as large as a cohort can make it, in patterns that pile everything up in few coefficients."""
    row = np.resize(np.array(pattern, dtype=np.float64), 2 * N) * (LARGEST_SUM // agents)
    found = open_sum(encryptor, decryptor, row[None], repeat=agents)
    assert_sums(found, row[None], agents, encryptor, repeat=agents)


def test_the_largest_cohort(encryptor: Encryptor, decryptor: Decryptor) -> None:
    """4,096 fresh ciphertexts: the noise stays far below half of a field."""
    check_packing(Packing.DENSE, encryptor.parameters, MAX_DENSE_AGENTS)
    each = LARGEST_SUM // MAX_DENSE_AGENTS
    terms = np.random.default_rng(3).integers(-each, each, (64, 2 * N), endpoint=True).astype(np.float64)
    terms[:, :64] = each
    found = open_sum(encryptor, decryptor, terms, repeat=64)
    assert_sums(found, terms, MAX_DENSE_AGENTS, encryptor, repeat=64)


def test_noise_in_units_is_as_documented(encryptor: Encryptor, decryptor: Decryptor) -> None:
    """One ciphertext has a deviation of 0.08 units, four of 0.16: what four agents add up is nearly always exact.

    Over 60 key pairs the share of wrong halves was 0.0043, deviation 0.0002: the bounds are eight of those off.
    """
    terms = np.random.default_rng(4).integers(-1000, 1000, (4, 20 * N)).astype(np.float64)
    found = open_sum(encryptor, decryptor, terms)
    wrong = np.count_nonzero(found != terms.sum(axis=0)) / found.size
    assert encryptor.parameters.noise_deviation() / PAIR_UNIT == pytest.approx(0.081, rel=0.02)
    assert 0.0025 < wrong < 0.006
