"""The paper's negotiation: agents vote with column tokens and order-preserving scores, the aggregator ranks tokens.

The aggregator learns how often a token was named and the order of the encrypted scores; not which column a token
stands for, and not a score.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shelora.errors import MalformedPayload, ShapeMismatch, ValueOutOfRange
from shelora.plan.negotiation import MAX_SCORE
from shelora.plan.seed import FederationSeed, keyed_permutation
from shelora.plan.sensitivity import check_scores


@dataclass(frozen=True)
class ColumnVote:
    """One column an agent names.

    Attributes:
        token: the column's token, 0 to n - 1.
        score: its order-preserving encrypted score, >= 0.

    Raises:
        ValueOutOfRange: a negative number.
    """

    token: int
    score: int

    def __post_init__(self) -> None:
        """Check both numbers."""
        if self.token < 0 or self.score < 0:
            raise ValueOutOfRange(
                f"expected a token and a score >= 0, got token {self.token} and score {self.score}",
                hint="send tokens of this plan version",
            )


def column_tokens(seed: FederationSeed, federation: str, plan_version: int, module: str, n: int) -> NDArray[np.int64]:
    """The token of every column: a keyed permutation, the same for all agents, unknown to the aggregator.

    Args:
        seed: the epoch's federation seed.
        federation: federation name.
        plan_version: version of the plan.
        module: module name.
        n: number of columns.

    Returns:
        int64[n], a permutation of 0 .. n-1.

    Raises:
        ValueOutOfRange: `n` < 0.
    """
    return keyed_permutation(seed.derive("column tokens", federation, plan_version, module), n)


def quantise_scores(scores: NDArray[np.float64], bits: int = 10) -> NDArray[np.int64]:
    """Map scores to a few integer levels, the same way for every agent, so that their order can be compared.

    Logarithmic, because scores are: half of the levels lie below 7 times the mean. Never decreasing.

    Args:
        scores: float[n], mean 1, finite, >= 0; above `MAX_SCORE` everything gets the highest level.
        bits: 1 to 31.

    Returns:
        int64[n], 0 to 2**bits - 1.

    Raises:
        ShapeMismatch, NonFiniteValue: a bad array.
        ValueOutOfRange: a negative score, or `bits` out of bounds.
    """
    check_scores("scores", scores)
    if not 1 <= bits <= 31:
        raise ValueOutOfRange(f"expected 1 to 31 bits, got {bits}", hint="10 bits are enough to rank columns")
    parts: NDArray[np.float64] = np.log1p(np.minimum(scores, MAX_SCORE)) / math.log1p(MAX_SCORE)
    highest = (1 << bits) - 1
    levels: NDArray[np.int64] = np.minimum(np.rint(parts * highest), highest).astype(np.int64)
    return levels


def rank_tokens(votes: Sequence[Sequence[ColumnVote]], limit: int) -> list[int]:
    """Rank the named columns of one module: by how many agents named them, then by the highest score, then by token.

    Args:
        votes: the votes of each agent. A token that one agent names twice counts as one vote with the higher score.
        limit: how many tokens at most, >= 0: the largest budget.

    Returns:
        Distinct tokens, the first one ranked highest; the same for any order of agents and votes.

    Raises:
        ValueOutOfRange: `limit` < 0.
    """
    if limit < 0:
        raise ValueOutOfRange(f"expected a limit >= 0, got {limit}", hint="take the largest budget of the plan")
    named: dict[int, int] = {}
    highest: dict[int, int] = {}
    for agent_votes in votes:
        for token in {vote.token for vote in agent_votes}:
            named[token] = named.get(token, 0) + 1
        for vote in agent_votes:
            highest[vote.token] = max(vote.score, highest.get(vote.token, 0))
    return sorted(named, key=lambda token: (-named[token], -highest[token], token))[:limit]


def priority_from_tokens(tokens: Sequence[int], token_of_column: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """Turn the aggregator's ranking back into columns.

    Args:
        tokens: ranked tokens, distinct, 0 to n - 1.
        token_of_column: int[n] from `column_tokens`.
        n: number of columns.

    Returns:
        int64[n], a permutation: the ranked columns, then all others by index (they are permuted every round anyway).

    Raises:
        ShapeMismatch: `token_of_column` has another length.
        ValueOutOfRange: a token out of range.
        MalformedPayload: a token twice.
    """
    if token_of_column.shape != (n,):
        raise ShapeMismatch(
            f"expected tokens for {n} columns, got shape {token_of_column.shape}",
            hint="take the tokens of this module",
        )
    for token in tokens:
        if not 0 <= token < n:
            raise ValueOutOfRange(
                f"expected tokens from 0 to {n - 1}, got {token}", hint="the ranking belongs to another module"
            )
    if len(set(tokens)) != len(tokens):
        raise MalformedPayload("expected every token once, got one twice", hint="fetch the ranking again")
    column_of_token = np.empty(n, dtype=np.int64)
    column_of_token[token_of_column] = np.arange(n)
    ranked = column_of_token[np.asarray(tokens, dtype=np.int64)]
    unnamed = np.ones(n, dtype=bool)
    unnamed[ranked] = False
    return np.concatenate([ranked, np.flatnonzero(unnamed)])
