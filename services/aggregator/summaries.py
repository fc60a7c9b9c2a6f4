"""What operators and late readers get to see, put together from the state and the rows around it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from services.aggregator import store
from services.aggregator.domain import (
    AgentSummary,
    FederationSummary,
    MemberSummary,
    PayloadKind,
    RoundSummary,
    Terms,
)
from services.aggregator.events import Presence
from services.aggregator.plans import present_plan
from services.aggregator.store import Connection, StoredFederation
from services.aggregator.store.payloads import AVERAGE, CIPHER_SUM, StoredPayload
from services.aggregator.store.rows import MILLISECONDS, Row, read_version
from shelora.errors import UnknownRound
from shelora.rounds import Federation, Member, Round, RoundPhase, task_for


def terms(stored: StoredFederation) -> Terms:
    """What an agent has to know before it registers; the plan's epoch is in force, the specification may be older."""
    spec, plan = stored.present_spec, present_plan(stored)
    return Terms(spec.epoch if plan is None else plan.epoch, spec.basis_cap, spec.packing)


async def federation_summary(connection: Connection, stored: StoredFederation) -> FederationSummary:
    """A federation with its plan and its running or last round."""
    state = stored.state
    latest = None if state.round is None else await _summarised(connection, stored.name, state.round)
    return FederationSummary(
        spec=stored.present_spec,
        state=state.state,
        plan=present_plan(stored),
        negotiated_by=0 if state.plan is None else state.plan.negotiated_by,
        round=latest,
        last_published_round=state.last_published_round,
        agents=len(state.agents),
        reason=state.reason,
        created_at_ms=stored.created_at_ms,
        signature=stored.signature,
    )


async def round_of(connection: Connection, federation: str, number: int) -> RoundSummary:
    """One round.

    Raises:
        UnknownRound: there has never been such a round.
    """
    found = await store.federations.load_round(connection, federation, number)
    if found is None:
        raise UnknownRound(f"expected a round of {federation}, got {number}", hint="list the rounds there are")
    return await _summarised(connection, federation, found)


async def _summarised(connection: Connection, federation: str, round_: Round) -> RoundSummary:
    payloads = await store.payloads.of_round(connection, federation, round_.number)
    return round_summary(round_, payloads, await store.history.figures_of(connection, federation, round_.number))


def round_summary(
    round_: Round, payloads: Iterable[StoredPayload], figures: Mapping[str, Mapping[str, float]]
) -> RoundSummary:
    """One round; its payloads give the sizes, also of bytes that are gone."""
    sizes = {(payload.key.kind, payload.key.agent): payload.blob.size_bytes for payload in payloads}
    published = round_.phase is RoundPhase.PUBLISHED
    return RoundSummary(
        number=round_.number,
        phase=round_.phase,
        plan_version=round_.plan_version,
        members=member_summaries(round_, round_.members.values(), sizes, figures),
        deadline_ms=round_.deadline_ms,
        started_at_ms=round_.started_at_ms,
        ended_at_ms=round_.ended_at_ms,
        reason=round_.reason,
        phase_seconds={phase.value: spent / MILLISECONDS for phase, spent in round_.phase_ms.items()},
        average_bytes=sizes.get((AVERAGE, ""), 0) if published else 0,
        cipher_bytes=sizes.get((CIPHER_SUM, ""), 0) if published else 0,
        total_weight=round_.total_weight,
    )


def member_summaries(
    round_: Round,
    members: Iterable[Member],
    sizes: Mapping[tuple[str, str], int],
    figures: Mapping[str, Mapping[str, float]],
) -> tuple[MemberSummary, ...]:
    """Members by name; a cohort in this order is in the order of the layout."""
    weights = round_.weights
    return tuple(
        MemberSummary(
            agent=member.agent,
            rank=member.rank,
            columns=member.columns,
            examples=member.examples,
            weight=weights.get(member.agent, 0.0),
            cipher_complete=member.complete,
            counted=member.counted,
            factors_bytes=sizes.get((PayloadKind.FACTORS.value, member.agent), 0),
            cipher_bytes=sizes.get((PayloadKind.CIPHER.value, member.agent), 0),
            metrics=figures.get(member.agent, {}),
            left_reason=member.left_reason,
        )
        for member in sorted(members, key=lambda member: member.agent)
    )


def agent_summaries(state: Federation, registrations: Iterable[Row], presence: Presence) -> list[AgentSummary]:
    """Registered agents by name."""
    return [
        AgentSummary(
            name=row["agent"],
            rank=row["rank"],
            columns=tuple(row["columns"]),
            budget=row["budget"],
            version=read_version(row),
            last_seen_ms=max(row["last_seen_ms"], presence.last_seen_ms(state.name, row["agent"])),
            connected=presence.connected(state.name, row["agent"]),
            task=task_for(state, row["agent"]),
            examples=row["examples"],
        )
        for row in registrations
    ]
