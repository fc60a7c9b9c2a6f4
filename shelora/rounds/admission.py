"""Whether an agent's contribution is welcome now. Asked before the first byte is taken and again before it counts."""

from __future__ import annotations

from shelora.errors import (
    ConflictingResend,
    FederationEnded,
    NotInCohort,
    StalePlan,
    UnknownAgent,
    UnknownRound,
    WrongPhase,
)
from shelora.rounds.federation import Ballot, Federation, Participant
from shelora.rounds.phases import AgentTask
from shelora.rounds.round import Member, Round

_FOLLOW_VIEW = "do what the view of the federation says"


def registered(state: Federation, agent: str) -> Participant:
    """The registered agent of that name.

    Raises:
        UnknownAgent: it never registered.
    """
    try:
        return state.agents[agent]
    except KeyError:
        raise UnknownAgent(
            f"expected a registered agent of {state.name}, got {agent!r}",
            hint="register first",
            context={"agent": agent, "federation": state.name},
        ) from None


def admit_ballot(state: Federation, agent: str, plan_version: int) -> Ballot:
    """The ballot that takes this agent's sensitivities or votes.

    Raises:
        UnknownAgent, FederationEnded: as the names say.
        WrongPhase: nothing is negotiated, or payloads are no longer taken.
        StalePlan: another plan version is negotiated.
        ConflictingResend: this agent's payload is there already.
    """
    _require_going_on(state)
    registered(state, agent)
    if state.negotiation is None:
        raise _wrong_phase(f"expected a negotiation in progress, got state {state.state.value}", agent)
    plan, ballot = state.negotiation
    if plan.version != plan_version:
        raise StalePlan(
            f"expected a payload for plan version {plan.version}, got {plan_version}",
            hint="make it again for the plan in the view",
            context={"agent": agent},
        )
    if ballot.closed:
        raise _wrong_phase("expected a negotiation that takes payloads, got one whose result is being computed", agent)
    if agent in ballot.received:
        raise _twice(agent, f"negotiation of plan version {plan_version}")
    return ballot


def admit_factors(state: Federation, agent: str, number: int) -> tuple[Round, Participant]:
    """The round that takes this agent's factors, and the agent's registration.

    Raises:
        UnknownAgent, FederationEnded, UnknownRound: as the names say.
        WrongPhase: the round is over or takes no factors.
        NotInCohort: the agent left the round.
        ConflictingResend: its factors are there already.
    """
    live = _round_taking(state, agent, number, AgentTask.FACTORS)
    participant = registered(state, agent)
    member = live.members.get(agent)
    if member is not None and member.left:
        raise _left(member, number)
    if member is not None and member.uploaded:
        raise _twice(agent, f"round {number}")
    return live, participant


def admit_cipher(state: Federation, agent: str, number: int) -> tuple[Round, Member]:
    """The round that takes this agent's ciphertext, and its membership.

    Raises:
        UnknownAgent, FederationEnded, UnknownRound: as the names say.
        WrongPhase: the round is over or takes no ciphertext.
        NotInCohort: the agent is no member of the cohort, or left.
        ConflictingResend: its ciphertext is there already.
    """
    live = _round_taking(state, agent, number, AgentTask.CIPHER)
    registered(state, agent)
    member = live.members.get(agent)
    if member is None or not member.in_cohort:
        raise NotInCohort(
            f"expected a member of the cohort of round {number}, got {agent!r}",
            hint="take part from the next round on",
            context={"agent": agent, "round": str(number)},
        )
    if member.complete:
        raise _twice(agent, f"round {number}")
    if member.left:
        raise _left(member, number)
    return live, member


def running_round(state: Federation, number: int) -> Round | None:
    """The running round of that number, None when that round is over.

    Raises:
        UnknownRound: there has never been such a round.
    """
    last = state.round
    if last is None or not 1 <= number <= last.number:
        raise UnknownRound(
            f"expected a round from 1 to {last.number if last else 0}, got {number}",
            hint=_FOLLOW_VIEW,
            context={"round": str(number)},
        )
    return last if last.number == number and not last.ended else None


def _round_taking(state: Federation, agent: str, number: int, task: AgentTask) -> Round:
    _require_going_on(state)
    live = running_round(state, number)
    if live is None:
        raise _wrong_phase(f"expected {task.value} for the running round, got round {number}, which is over", agent)
    if state.rules.strategy.rule(live.phase).task is not task:
        raise _wrong_phase(f"expected a phase that takes {task.value}, got {live.phase.value} in round {number}", agent)
    return live


def _require_going_on(state: Federation) -> None:
    if state.ended:
        raise FederationEnded(
            f"expected a federation that goes on, got {state.name} in state {state.state.value}",
            hint="leave; an operator can start it again",
            context={"federation": state.name},
        )


def _wrong_phase(message: str, agent: str) -> WrongPhase:
    return WrongPhase(message, hint=_FOLLOW_VIEW, context={"agent": agent})


def _twice(agent: str, where: str) -> ConflictingResend:
    return ConflictingResend(
        f"expected one payload of {agent!r} in {where}, got another one",
        hint="send the first payload again, byte by byte, or wait for the next round",
        context={"agent": agent},
    )


def _left(member: Member, number: int) -> NotInCohort:
    return NotInCohort(
        f"expected an agent that takes part in round {number}, got {member.agent!r}, which left: {member.left_reason}",
        hint="take part from the next round on",
        context={"agent": member.agent, "round": str(number)},
    )
