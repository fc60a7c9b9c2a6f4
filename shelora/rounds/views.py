"""What an agent should do now, read off the state; a reconnected agent needs nothing else."""

from __future__ import annotations

from shelora.rounds.federation import Federation
from shelora.rounds.phases import AgentTask
from shelora.rounds.round import Round


def task_for(state: Federation, agent: str) -> AgentTask:
    """The task of one agent.

    Args:
        state: any state.
        agent: a registered agent's name; any other waits.

    Returns:
        NEGOTIATE while its sensitivities or votes are missing; FACTORS or CIPHER while they are taken and missing and
        it has not left the round; LEAVE once the federation is over; else WAIT.
    """
    if state.ended:
        return AgentTask.LEAVE
    if agent not in state.agents:
        return AgentTask.WAIT
    if state.negotiation is not None:
        _, ballot = state.negotiation
        return AgentTask.WAIT if ballot.closed or agent in ballot.received else AgentTask.NEGOTIATE
    live = state.live_round
    return AgentTask.WAIT if live is None else _round_task(live, state.rules.strategy.rule(live.phase).task, agent)


def _round_task(live: Round, task: AgentTask, agent: str) -> AgentTask:
    member = live.members.get(agent)
    if member is not None and member.left:
        return AgentTask.WAIT
    if task is AgentTask.FACTORS:
        return AgentTask.FACTORS if member is None or not member.uploaded else AgentTask.WAIT
    if task is AgentTask.CIPHER:
        return AgentTask.CIPHER if member is not None and member.in_cohort and not member.complete else AgentTask.WAIT
    return AgentTask.WAIT


def vote_columns(state: Federation, widths: tuple[int, ...]) -> tuple[int, ...]:
    """Columns per module that agents vote for: the largest level below the module's width, 0 where there is none.

    Args:
        state: any state.
        widths: input width n of every module.

    Returns:
        One count per module; empty unless a negotiation is in progress.
    """
    if state.negotiation is None:
        return ()
    plan, _ = state.negotiation
    return tuple(
        max((level for level in levels if level < n), default=0) for levels, n in zip(plan.levels, widths, strict=True)
    )
