"""What a transition asks for: entries of the history, and computations.

Computations are levels, not edges: `pending` reads them off any state, so whoever runs them needs no memory of its own
and continues after a restart with the same call. Running one twice is harmless; its result is accepted once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypeAlias

from shelora.plan.plan import Negotiation
from shelora.rounds.federation import Ballot, Federation, PlanOutline
from shelora.rounds.round import Round
from shelora.rounds.strategy import Computation

FOLD_TERMS: Final = 16
"""Ciphertexts worth a new running sum before the last one is in: writing it costs as much as adding that many."""


@dataclass(frozen=True)
class Record:
    """An entry of the federation's history.

    Attributes:
        kind: what happened, a stable word.
        round: round number, 0 if none.
        agent: agent, empty if none.
        detail: further text.
    """

    kind: str
    round: int = 0
    agent: str = ""
    detail: str = ""


@dataclass(frozen=True)
class RoundEnded:
    """A round is published or abandoned. The state may already hold the next one, so this is its last word."""

    round: Round


@dataclass(frozen=True)
class SumSensitivities:
    """Add up the encrypted sensitivities of these agents."""

    plan_version: int
    agents: tuple[str, ...]


@dataclass(frozen=True)
class RankVotes:
    """Rank the votes of these agents."""

    plan_version: int
    agents: tuple[str, ...]


@dataclass(frozen=True)
class ComputeBasis:
    """Compute the common basis and the cohort's projections."""

    round: int


@dataclass(frozen=True)
class FoldResidues:
    """Add these agents' ciphertexts to the running sum."""

    round: int
    agents: tuple[str, ...]


@dataclass(frozen=True)
class ComputeAverage:
    """Compute the plain part of the average over the counted members."""

    round: int


Work: TypeAlias = SumSensitivities | RankVotes | ComputeBasis | FoldResidues | ComputeAverage
"""Something to compute."""

Effect: TypeAlias = Record | RoundEnded | Work
"""Everything `transition` returns beside the state."""


def pending(state: Federation) -> tuple[Work, ...]:
    """Everything that has to be computed in this state, the first first.

    Args:
        state: any state.

    Returns:
        At most one computation: results build on each other.
    """
    negotiation = state.negotiation
    if negotiation is not None:
        return _pending_negotiation(*negotiation)
    live = state.live_round
    return () if live is None else _pending_round(live, state)


def awaits(state: Federation, work: Work) -> bool:
    """Whether the result of a computation is still wanted.

    Args:
        state: any state.
        work: what was computed.

    Returns:
        True when `work` is pending; a fold also when it covers a part of what is to be folded by now.
    """
    for wanted in pending(state):
        if isinstance(wanted, FoldResidues) and isinstance(work, FoldResidues):
            return wanted.round == work.round and set(wanted.agents) >= set(work.agents)
        if wanted == work:
            return True
    return False


def _pending_negotiation(plan: PlanOutline, ballot: Ballot) -> tuple[Work, ...]:
    if not ballot.closed:
        return ()
    if plan.negotiation is Negotiation.OPE:
        return (RankVotes(plan.version, ballot.contributors),)
    return (SumSensitivities(plan.version, ballot.contributors),)


def _pending_round(live: Round, state: Federation) -> tuple[Work, ...]:
    computation = state.rules.strategy.rule(live.phase).computation
    unfolded = live.tally.unfolded
    if len(unfolded) >= FOLD_TERMS or (unfolded and computation is Computation.AVERAGE):
        return (FoldResidues(live.number, tuple(sorted(unfolded))),)
    if computation is Computation.BASIS:
        return (ComputeBasis(live.number),)
    if computation is Computation.AVERAGE:
        return (ComputeAverage(live.number),)
    return ()
