"""What happens between rounds: plans, negotiations, opening and ending rounds, the end of the federation."""

from __future__ import annotations

from dataclasses import replace

from shelora.plan.plan import Negotiation
from shelora.rounds.federation import NEGOTIATION_ATTEMPTS, RANKS_PER_CAP, Ballot, Federation, PlanOutline
from shelora.rounds.phases import FederationState, RoundPhase
from shelora.rounds.round import Round
from shelora.rounds.step import Step
from shelora.rounds.strategy import Timer


def cross_boundary(step: Step) -> None:
    """Decide what follows a round or the gathering: the end, a new plan, or the next round."""
    state = step.state
    if state.published >= state.rounds:
        step.set(state=FederationState.FINISHED, deadline_ms=0)
        step.record("federation_finished", detail=f"{state.published} rounds published")
    elif _plan_due(state):
        begin_plan(step)
    else:
        open_round(step)


def begin_plan(step: Step) -> None:
    """Fix a new plan version from the registrations, and negotiate it when some budget is partial."""
    state = step.state
    epoch = state.next_epoch or state.epoch
    plan = outline(state, epoch)
    step.set(plan=plan, epoch=epoch, next_epoch=0, ballot=None)
    step.record("plan_fixed", detail=f"version {plan.version}, epoch {epoch}, {len(state.agents)} agents")
    if plan.settled:
        open_round(step)
    else:
        _invite(step, attempt=1, received=frozenset())


def outline(state: Federation, epoch: int) -> PlanOutline:
    """The next plan version: levels are the distinct registered column counts."""
    participants = state.agents.values()
    selective = any(participant.selective for participant in participants)
    negotiation = state.rules.negotiation if selective else Negotiation.NONE
    per_module = zip(*(participant.columns for participant in participants), strict=True)
    return PlanOutline(
        version=1 if state.plan is None else state.plan.version + 1,
        epoch=epoch,
        cap=state.rules.basis_cap or RANKS_PER_CAP * max(participant.rank for participant in participants),
        levels=tuple(tuple(sorted(set(counts))) for counts in per_module),
        negotiation=negotiation,
        settled=negotiation is Negotiation.NONE,
        published_before=state.published,
    )


def retry_negotiation(step: Step, ballot: Ballot) -> None:
    """Invite again, or stop after the last attempt; payloads that are there stay valid."""
    if ballot.attempt >= NEGOTIATION_ATTEMPTS:
        stop(step, f"negotiation failed {NEGOTIATION_ATTEMPTS} times for want of a quorum of {step.state.rules.quorum}")
    else:
        _invite(step, attempt=ballot.attempt + 1, received=ballot.received)


def settle_plan(step: Step) -> None:
    """Take the negotiated plan into use and open the next round."""
    plan, ballot = step.negotiation
    step.set(plan=replace(plan, settled=True, negotiated_by=len(ballot.contributors)), ballot=None, deadline_ms=0)
    step.record("negotiation_finished", detail=f"version {plan.version}, {len(ballot.contributors)} agents")
    open_round(step)


def open_round(step: Step) -> None:
    """Open the next round in the strategy's first phase."""
    state = step.state
    number = 1 if state.round is None else state.round.number + 1
    version = 0 if state.plan is None else state.plan.version
    first = state.rules.strategy.first
    round_ = Round(number, first, version, started_at_ms=step.now_ms, phase_started_ms=step.now_ms)
    step.set(state=FederationState.RUNNING, ballot=None, deadline_ms=0, round=round_)
    step.set_round(deadline_ms=_deadline_ms(step, first))
    step.record("round_opened", round=number, detail=f"plan version {version}")


def advance(step: Step, then: RoundPhase) -> None:
    """Move the running round to another phase of its strategy."""
    step.set_round(phase=then, phase_started_ms=step.now_ms, phase_ms=_spent(step))
    step.set_round(deadline_ms=_deadline_ms(step, then))


def publish(step: Step) -> None:
    """End the running round with its average and cross the boundary."""
    number = step.round.number
    step.record("round_published", round=number, detail=f"{len(step.round.counted)} members")
    _end(step, RoundPhase.PUBLISHED, "")
    step.set(published=step.state.published + 1, last_published_round=number, abandoned_in_a_row=0)
    cross_boundary(step)


def abandon(step: Step, reason: str) -> None:
    """End the running round without an average and cross the boundary, or stop after too many in a row."""
    _abandon_round(step, reason)
    abandoned = step.state.abandoned_in_a_row + 1
    step.set(abandoned_in_a_row=abandoned)
    if abandoned >= step.state.rules.abandoned_limit:
        stop(step, f"{abandoned} rounds in a row were abandoned, the last one because {reason}")
    else:
        cross_boundary(step)


def stop(step: Step, reason: str) -> None:
    """Stop the federation, abandoning the running round."""
    if step.state.live_round is not None:
        _abandon_round(step, f"the federation was stopped: {reason}")
    step.set(state=FederationState.STOPPED, reason=reason, ballot=None, deadline_ms=0)
    step.record("federation_stopped", detail=reason)


def _abandon_round(step: Step, reason: str) -> None:
    step.record("round_abandoned", round=step.round.number, detail=reason)
    _end(step, RoundPhase.ABANDONED, reason)


def _end(step: Step, phase: RoundPhase, reason: str) -> None:
    step.end_round(phase=phase, reason=reason, deadline_ms=0, ended_at_ms=step.now_ms, phase_ms=_spent(step))


def _spent(step: Step) -> dict[RoundPhase, int]:
    live = step.round
    return {**live.phase_ms, live.phase: step.now_ms - live.phase_started_ms}


def _deadline_ms(step: Step, phase: RoundPhase) -> int:
    rules = step.state.rules
    timer = rules.strategy.rule(phase).timer
    if timer is Timer.TRAIN:
        return step.now_ms + rules.train_timeout_ms
    if timer is Timer.CIPHER:
        return step.now_ms + rules.cipher_timeout_ms
    return step.round.deadline_ms if timer is Timer.KEPT else 0


def _plan_due(state: Federation) -> bool:
    plan = state.plan
    if plan is None or not plan.settled or state.next_epoch:
        return True
    every = state.rules.renegotiate_every
    return every > 0 and state.published - plan.published_before >= every


def _invite(step: Step, attempt: int, received: frozenset[str]) -> None:
    invited = frozenset(step.state.agents)
    step.set(
        state=FederationState.NEGOTIATING,
        ballot=Ballot(attempt, invited, received),
        deadline_ms=step.now_ms + step.state.rules.negotiate_timeout_ms,
    )
    step.record("negotiation_opened", detail=f"attempt {attempt}, {len(invited)} agents invited")
