"""The round state machine: a pure function from a state, an event and a time to the next state and what it asks for.

Nothing here waits, stores or computes. A caller that stores the new state and the cause of the event in one transaction
may die at any line and go on: `shelora.rounds.effects.pending` derives the open computations from the stored state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from shelora.errors import FederationEnded, WrongEpoch, WrongPhase
from shelora.rounds import boundary, events
from shelora.rounds.admission import admit_ballot, admit_cipher, admit_factors, registered, running_round
from shelora.rounds.effects import (
    ComputeAverage,
    ComputeBasis,
    Effect,
    FoldResidues,
    RankVotes,
    SumSensitivities,
    Work,
    awaits,
    pending,
)
from shelora.rounds.federation import Federation
from shelora.rounds.gates import settle
from shelora.rounds.phases import FederationState, RoundPhase
from shelora.rounds.round import Member
from shelora.rounds.step import Step


def transition(state: Federation, event: events.Event, now_ms: int) -> tuple[Federation, tuple[Effect, ...]]:
    """Apply one event.

    Args:
        state: the present state; it is not changed.
        event: what happened.
        now_ms: when, in milliseconds since the Unix epoch.

    Returns:
        The next state; history entries and ended rounds in order, then the computations that became necessary.

    Raises:
        UnknownAgent, UnknownRound: the event names something that does not exist.
        WrongPhase, StalePlan, NotInCohort, ConflictingResend, FederationEnded, WrongEpoch: the event is not welcome in
            this state; nothing has changed.
    """
    step = Step(state, now_ms)
    _HANDLERS[type(event)](step, event)
    settle(step)
    before = pending(state)
    fresh = tuple(work for work in pending(step.state) if work not in before)
    return step.state, (*step.effects, *fresh)


def _started(step: Step, event: events.Started) -> None:
    state = step.state
    going_on = not state.ended and state.state is not FederationState.CREATED
    if going_on:
        if event.more_rounds:
            raise WrongPhase(
                f"expected a finished federation to add {event.more_rounds} rounds to, got {state.state.value}",
                hint="add rounds once it has finished",
                context={"federation": state.name},
            )
        return
    rounds = state.rounds + event.more_rounds
    if state.published >= rounds:
        raise FederationEnded(
            f"expected rounds left to run, got {state.published} of {rounds} published",
            hint="start it with more rounds",
            context={"federation": state.name},
        )
    step.set(state=FederationState.GATHERING, rounds=rounds, reason="", abandoned_in_a_row=0)
    step.set(deadline_ms=step.now_ms + state.rules.gather_timeout_ms)
    step.record("federation_started", detail=f"{rounds} rounds")


def _stopped(step: Step, event: events.Stopped) -> None:
    if not step.state.ended:
        boundary.stop(step, event.reason or "an operator stopped it")


def _epoch_adopted(step: Step, event: events.EpochAdopted) -> None:
    state = step.state
    newest = max(state.epoch, state.next_epoch)
    if event.epoch == newest:
        return
    if event.epoch < newest:
        raise WrongEpoch(
            f"expected a key epoch after {newest}, got {event.epoch}",
            hint="rotate the keys first, then adopt the new epoch",
            context={"federation": state.name},
        )
    step.set(next_epoch=event.epoch)
    step.record("epoch_adopted", detail=f"epoch {event.epoch} from the next round boundary on")
    if state.negotiation is not None:
        boundary.begin_plan(step)


def _agent_registered(step: Step, event: events.AgentRegistered) -> None:
    state, participant = step.state, event.participant
    if state.agents.get(participant.agent) == participant:
        return
    step.set(agents={**state.agents, participant.agent: participant})
    step.record("agent_registered", agent=participant.agent, detail=f"rank {participant.rank}")


def _ballot_received(step: Step, event: events.BallotReceived) -> None:
    ballot = admit_ballot(step.state, event.agent, event.plan_version)
    step.set(ballot=replace(ballot, received=ballot.received | {event.agent}))
    step.record("ballot_received", agent=event.agent, detail=f"plan version {event.plan_version}")


def _factors_received(step: Step, event: events.FactorsReceived) -> None:
    live, agent = admit_factors(step.state, event.agent, event.round)
    member = Member(agent.agent, agent.rank, agent.columns, examples=event.examples, uploaded=True)
    step.set(round=live.with_member(member))
    step.record("factors_received", round=event.round, agent=event.agent, detail=f"{event.examples} examples")


def _cipher_received(step: Step, event: events.CipherReceived) -> None:
    live, member = admit_cipher(step.state, event.agent, event.round)
    step.set(round=live.with_member(replace(member, complete=True)))
    step.record("cipher_received", round=event.round, agent=event.agent)


def _agent_left(step: Step, event: events.AgentLeft) -> None:
    participant = registered(step.state, event.agent)
    live = running_round(step.state, event.round)
    if live is None or live.phase is RoundPhase.SUM:
        return
    member = live.members.get(event.agent)
    if member is None:
        member = Member(participant.agent, participant.rank, participant.columns)
    closed_without_it = bool(live.cohort) and not member.in_cohort
    if closed_without_it or member.left or member.complete:
        return
    left = replace(member, left_reason=event.reason or "no reason given")
    step.set(round=live.with_member(left))
    step.record("agent_left", round=event.round, agent=event.agent, detail=left.left_reason)


def _computed(step: Step, event: events.Computed) -> None:
    work = event.work
    if not awaits(step.state, work):
        raise WrongPhase(
            f"expected a result that is waited for, got one of {work}",
            hint="drop it",
            context={"federation": step.state.name},
        )
    _RESULTS[type(work)](step, work)


def _negotiation_computed(step: Step, work: Work) -> None:
    boundary.settle_plan(step)


def _basis_computed(step: Step, work: ComputeBasis) -> None:
    step.record("basis_computed", round=work.round)
    boundary.advance(step, step.state.rules.strategy.rule(step.round.phase).then)


def _average_computed(step: Step, work: ComputeAverage) -> None:
    boundary.publish(step)


def _residues_folded(step: Step, work: FoldResidues) -> None:
    live = step.round
    folded = {agent: replace(live.members[agent], folded=True) for agent in work.agents}
    step.set(round=live.with_members(folded))


def _computation_failed(step: Step, event: events.ComputationFailed) -> None:
    if not awaits(step.state, event.work):
        return
    if step.state.negotiation is not None:
        boundary.stop(step, f"the negotiation failed: {event.reason}")
    else:
        boundary.abandon(step, event.reason)


def _ticked(step: Step, event: events.Ticked) -> None:
    """Nothing by itself: the gates read the time."""


def _resumed(step: Step, event: events.Resumed) -> None:
    earliest = step.now_ms + event.grace_ms
    live = step.state.live_round
    if live is not None and live.deadline_ms:
        step.set_round(deadline_ms=max(live.deadline_ms, earliest))
    elif step.state.deadline_ms:
        step.set(deadline_ms=max(step.state.deadline_ms, earliest))


_RESULTS: dict[type[Any], Callable[[Step, Any], None]] = {
    SumSensitivities: _negotiation_computed,
    RankVotes: _negotiation_computed,
    ComputeBasis: _basis_computed,
    FoldResidues: _residues_folded,
    ComputeAverage: _average_computed,
}

_HANDLERS: dict[type[Any], Callable[[Step, Any], None]] = {
    events.Started: _started,
    events.Stopped: _stopped,
    events.EpochAdopted: _epoch_adopted,
    events.AgentRegistered: _agent_registered,
    events.BallotReceived: _ballot_received,
    events.FactorsReceived: _factors_received,
    events.CipherReceived: _cipher_received,
    events.AgentLeft: _agent_left,
    events.Computed: _computed,
    events.ComputationFailed: _computation_failed,
    events.Ticked: _ticked,
    events.Resumed: _resumed,
}
