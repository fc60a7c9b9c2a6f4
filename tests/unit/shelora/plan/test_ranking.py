from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shelora.errors import MalformedPayload, NonFiniteValue, ShapeMismatch, ValueOutOfRange
from shelora.plan import (
    MAX_SCORE,
    ColumnVote,
    FederationSeed,
    column_tokens,
    order_columns,
    priority_from_tokens,
    quantise_scores,
    rank_tokens,
)

SEED = FederationSeed(bytes(range(32)))
votes = st.lists(st.lists(st.builds(ColumnVote, st.integers(0, 9), st.integers(0, 5)), max_size=8), max_size=5)


@given(st.integers(0, 80), st.integers(0, 5))
def test_tokens_are_a_permutation(n: int, version: int) -> None:
    assert sorted(column_tokens(SEED, "fed", version, "m", n).tolist()) == list(range(n))


def test_tokens_differ_by_every_label_and_from_the_wire_order_labels() -> None:
    variants = [
        column_tokens(SEED, "fed", 1, "m", 40),
        column_tokens(FederationSeed(bytes(32)), "fed", 1, "m", 40),
        column_tokens(SEED, "other", 1, "m", 40),
        column_tokens(SEED, "fed", 2, "m", 40),
        column_tokens(SEED, "fed", 1, "n", 40),
    ]
    assert len({tokens.tobytes() for tokens in variants}) == len(variants)


def test_tokens_are_frozen() -> None:
    assert column_tokens(SEED, "fed", 2, "layer.0.query", 10).tolist() == [1, 8, 2, 9, 6, 0, 7, 5, 4, 3]


@given(hnp.arrays(np.float64, 10, elements=st.floats(0, 1e6)), st.integers(1, 31))
def test_quantised_scores_keep_the_order_and_the_range(scores: np.ndarray, bits: int) -> None:
    levels = quantise_scores(scores, bits)
    assert levels.dtype == np.int64
    assert levels.min() >= 0
    assert levels.max() < 2**bits
    assert (np.diff(levels[np.argsort(scores)]) >= 0).all()


def test_quantised_scores_use_the_whole_range() -> None:
    assert quantise_scores(np.array([0.0, 7.06, MAX_SCORE, 1e9])).tolist() == [0, 511, 1023, 1023]


def test_quantise_refuses_bad_arguments() -> None:
    for bits in (0, 32):
        with pytest.raises(ValueOutOfRange, match="bits"):
            quantise_scores(np.ones(3), bits)
    with pytest.raises(NonFiniteValue):
        quantise_scores(np.array([np.nan]))


def test_ranking_by_agents_then_score_then_token() -> None:
    ballots = [
        [ColumnVote(4, 1), ColumnVote(7, 9), ColumnVote(2, 3)],
        [ColumnVote(4, 2), ColumnVote(9, 9)],
        [ColumnVote(2, 2)],
    ]
    assert rank_tokens(ballots, 10) == [2, 4, 7, 9]
    assert rank_tokens(ballots, 2) == [2, 4]
    assert rank_tokens(ballots, 0) == []
    assert rank_tokens([], 3) == []


def test_an_agent_cannot_vote_twice_for_a_column() -> None:
    assert rank_tokens([[ColumnVote(1, 1)] * 5, [ColumnVote(2, 0)], [ColumnVote(2, 0)]], 2) == [2, 1]
    assert rank_tokens([[ColumnVote(1, 1), ColumnVote(1, 7)], [ColumnVote(2, 5)]], 2) == [1, 2]


@given(votes, st.integers(0, 12), st.randoms(use_true_random=False))
def test_ranking_does_not_depend_on_the_order_of_arrival(
    ballots: list[list[ColumnVote]], limit: int, generator: random.Random
) -> None:
    ranked = rank_tokens(ballots, limit)
    assert len(ranked) == min(limit, len({vote.token for ballot in ballots for vote in ballot}))
    for ballot in ballots:
        generator.shuffle(ballot)
    generator.shuffle(ballots)
    assert rank_tokens(ballots, limit) == ranked
    assert rank_tokens(ballots, limit + 1)[:limit] == ranked


def test_negative_numbers_are_refused() -> None:
    for token, score in ((-1, 0), (0, -1)):
        with pytest.raises(ValueOutOfRange):
            ColumnVote(token, score)
    with pytest.raises(ValueOutOfRange, match="limit"):
        rank_tokens([], -1)


@given(st.data(), st.integers(1, 30))
def test_priority_starts_with_the_ranked_columns(data: st.DataObject, n: int) -> None:
    tokens = column_tokens(SEED, "fed", 1, "m", n)
    columns = data.draw(st.lists(st.integers(0, n - 1), unique=True))
    priority = priority_from_tokens([int(tokens[column]) for column in columns], tokens, n)
    assert priority.dtype == np.int64
    assert priority.tolist() == columns + [column for column in range(n) if column not in columns]


def test_a_whole_negotiation_finds_the_sensitive_columns() -> None:
    n, k = 50, 6
    tokens = column_tokens(SEED, "fed", 1, "m", n)
    ballots = []
    for agent in range(4):
        scores = np.linspace(2, 0, n) + np.where(np.arange(n) % 10 == 3, 5.0, 0.0) + agent * 1e-3
        levels = quantise_scores(scores / scores.mean())
        ballots.append([ColumnVote(int(tokens[c]), int(levels[c])) for c in order_columns(scores)[:k]])
    priority = priority_from_tokens(rank_tokens(ballots, k), tokens, n)
    assert set(priority[:k].tolist()) == {0, 3, 13, 23, 33, 43}


@pytest.mark.parametrize(
    ("ranked", "n", "error"),
    [
        ([0], 4, ShapeMismatch),
        ([3], 3, ValueOutOfRange),
        ([-1], 3, ValueOutOfRange),
        ([1, 1], 3, MalformedPayload),
    ],
)
def test_bad_rankings_are_refused(ranked: list[int], n: int, error: type[Exception]) -> None:
    with pytest.raises(error):
        priority_from_tokens(ranked, np.arange(3), n)
