"""What an agent should do now, read off the state; a reconnected agent needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

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


def concerned(before: Federation, after: Federation) -> frozenset[str] | None:
    """Agents that have something new to know after a step; with thousands of them it is not for all to look.

    All agents know the same but for their tasks, and those follow from their own registration, ballot and membership.

    Args:
        before: any state.
        after: what became of it.

    Returns:
        Names, or None when what all know has changed.
    """
    if _common(before) != _common(after):
        return None
    received = [frozenset[str]() if state.ballot is None else state.ballot.received for state in (before, after)]
    members: list[Mapping[str, Any]] = [{} if state.round is None else state.round.members for state in (before, after)]
    return frozenset((*differing(before.agents, after.agents), *differing(*members), *(received[0] ^ received[1])))


def _common(state: Federation) -> tuple[object, ...]:
    ballot = None if state.ballot is None else (state.ballot.attempt, state.ballot.closed)
    round_ = None if state.round is None else replace(state.round, members={})
    return replace(state, agents={}, ballot=None, round=None), ballot, round_


def differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Keys whose values differ; a step leaves almost all values the very same, so thousands of them take little time.

    Args:
        before: by key.
        after: what became of it.
    """
    if before is after:
        return []
    touched = [key for key, value in after.items() if before.get(key) is not value]
    return [*(before.keys() - after.keys()), *(key for key in touched if before.get(key) != after[key])]
