"""When a phase is over. Gates read the state and the time only, so they are asked again after every event."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from shelora.plan.negotiation import MAX_SUMMED_AGENTS
from shelora.plan.plan import Negotiation
from shelora.rounds.boundary import abandon, advance, cross_boundary, retry_negotiation
from shelora.rounds.federation import Ballot, Federation
from shelora.rounds.phases import FederationState
from shelora.rounds.round import Round
from shelora.rounds.step import Step
from shelora.rounds.strategy import Gate


def settle(step: Step) -> None:
    """Open every gate that can open now, until none can."""
    seen: Federation | None = None
    while seen is not step.state:
        seen = step.state
        if seen.state is FederationState.GATHERING:
            _gathering(step, seen)
        elif seen.negotiation is not None:
            _negotiating(step, seen.negotiation[1])
        elif seen.live_round is not None:
            live = seen.live_round
            _GATES[seen.rules.strategy.rule(live.phase).gate](step, live)


def _gathering(step: Step, state: Federation) -> None:
    expired = step.now_ms >= state.deadline_ms
    if len(state.agents) >= state.rules.target_agents or (expired and len(state.agents) >= state.rules.quorum):
        cross_boundary(step)
    elif expired:
        step.set(deadline_ms=step.now_ms + state.rules.gather_timeout_ms)
        step.record("gathering_extended", detail=f"{len(state.agents)} agents, quorum {state.rules.quorum}")


def _negotiating(step: Step, ballot: Ballot) -> None:
    if ballot.closed:
        return
    rules = step.state.rules
    enough = len(ballot.received) >= rules.quorum
    expired = step.now_ms >= step.state.deadline_ms
    full = rules.negotiation is Negotiation.ENCRYPTED and len(ballot.received) >= MAX_SUMMED_AGENTS
    if full or (enough and (expired or ballot.received >= ballot.invited)):
        step.set(ballot=replace(ballot, contributors=tuple(sorted(ballot.received))), deadline_ms=0)
        step.record("negotiation_closed", detail=f"{len(ballot.received)} agents")
    elif expired:
        retry_negotiation(step, ballot)


def _first_factors(step: Step, live: Round) -> None:
    if live.tally.candidates:
        advance(step, step.state.rules.strategy.rule(live.phase).then)
    elif _expired(step, live):
        abandon(step, "no factors came before the deadline")


def _cohort(step: Step, live: Round) -> None:
    rules = step.state.rules
    count = live.tally.candidates
    expired = _expired(step, live)
    agents = step.state.agents
    answered = len(live.members) >= len(agents) and all(agent in live.members for agent in agents)
    if count >= rules.target_agents or (count >= rules.quorum and (answered or expired)):
        cohort = {member.agent: replace(member, in_cohort=True) for member in live.candidates}
        step.set(round=live.with_members(cohort))
        step.record("cohort_closed", round=live.number, detail=f"{count} members")
        advance(step, rules.strategy.rule(live.phase).then)
    elif expired:
        abandon(step, f"factors of {count} agents came before the deadline, the quorum is {rules.quorum}")


def _ciphertexts(step: Step, live: Round) -> None:
    quorum = step.state.rules.quorum
    complete, awaited = live.tally.complete, live.tally.awaited
    over = not awaited or _expired(step, live)
    if complete >= quorum and over:
        counted = {member.agent: replace(member, counted=True) for member in live.complete}
        step.set(round=live.with_members(counted))
        step.record("members_fixed", round=live.number, detail=f"{complete} of {len(live.cohort)} members")
        advance(step, step.state.rules.strategy.rule(live.phase).then)
    elif over or complete + awaited < quorum:
        abandon(step, f"ciphertexts of {complete} members came, the quorum is {quorum}")


def _computed(step: Step, live: Round) -> None:
    """A computation ends the phase by its own event."""


def _expired(step: Step, live: Round) -> bool:
    return live.deadline_ms != 0 and step.now_ms >= live.deadline_ms


_GATES: dict[Gate, Callable[[Step, Round], None]] = {
    Gate.FIRST_FACTORS: _first_factors,
    Gate.COHORT: _cohort,
    Gate.CIPHERTEXTS: _ciphertexts,
    Gate.COMPUTED: _computed,
}
