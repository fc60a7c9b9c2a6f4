"""Wire messages of the aggregator and of the agents' control interface, to operators' domain values and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from enum import Enum
from typing import Any, TypeVar

from services.common.codec import (
    negotiation_from_proto,
    negotiation_to_proto,
    packing_from_proto,
    packing_to_proto,
    parameters_from_proto,
    parameters_to_proto,
    plan_from_proto,
    shapes_from_proto,
)
from services.operators.domain import (
    AgentProgress,
    Event,
    Federation,
    FederationSpec,
    Member,
    RegisteredAgent,
    Round,
)
from shelora.errors import MalformedPayload
from shelora.rounds.phases import AgentTask, FederationState, RoundPhase
from shelora.v1 import agent_pb2, aggregator_pb2

Word = TypeVar("Word", bound=Enum)


def spec_to_proto(spec: FederationSpec) -> aggregator_pb2.FederationSpec:
    """The specification as the aggregator takes it."""
    message = aggregator_pb2.FederationSpec(
        federation=spec.federation,
        rounds=spec.rounds,
        target_agents=spec.target_agents,
        quorum=spec.quorum,
        renegotiate_every=spec.renegotiate_every,
        gather_timeout_s=spec.gather_timeout_s,
        negotiate_timeout_s=spec.negotiate_timeout_s,
        train_timeout_s=spec.train_timeout_s,
        cipher_timeout_s=spec.cipher_timeout_s,
        basis_cap=spec.basis_cap,
        epoch=spec.epoch,
        parameters=parameters_to_proto(spec.parameters),
        max_abandoned=spec.max_abandoned,
        strategy=spec.strategy,
        packing=packing_to_proto(spec.packing),
    )
    if spec.negotiation is not None:
        message.negotiation = negotiation_to_proto(spec.negotiation)
    return message


def spec_from_proto(message: aggregator_pb2.FederationSpec) -> FederationSpec:
    """The specification as the aggregator keeps it."""
    return FederationSpec(
        federation=message.federation,
        rounds=message.rounds,
        target_agents=message.target_agents,
        quorum=message.quorum,
        epoch=message.epoch,
        parameters=parameters_from_proto(message.parameters),
        negotiation=negotiation_from_proto(message.negotiation) if message.negotiation else None,
        renegotiate_every=message.renegotiate_every,
        gather_timeout_s=message.gather_timeout_s,
        negotiate_timeout_s=message.negotiate_timeout_s,
        train_timeout_s=message.train_timeout_s,
        cipher_timeout_s=message.cipher_timeout_s,
        basis_cap=message.basis_cap,
        max_abandoned=message.max_abandoned,
        strategy=message.strategy,
        packing=packing_from_proto(message.packing),
    )


def federation_from_proto(message: aggregator_pb2.Federation) -> Federation:
    """A federation with its plan and running round, where it has them.

    Raises:
        MalformedPayload: a state or phase this release does not know.
        InvalidPlan, DigestMismatch: a plan that contradicts itself.
    """
    state = _word(FederationState, aggregator_pb2.FederationState, message.state)
    if state is None:
        raise MalformedPayload("federation: expected a state, got none", hint="install the same release on both sides")
    has_shapes = message.HasField("signature")
    return Federation(
        spec=spec_from_proto(message.spec),
        state=state,
        plan=plan_from_proto(message.plan) if message.HasField("plan") else None,
        round=round_from_proto(message.round) if message.HasField("round") else None,
        last_published_round=message.last_published_round,
        agents=message.agents,
        reason=message.reason,
        created_at_ms=message.created_at_ms,
        shapes=shapes_from_proto(message.signature.shapes) if has_shapes else None,
        task=message.signature.task if has_shapes else "",
    )


def rounds_from_proto(parts: Iterable[aggregator_pb2.Round]) -> list[Round]:
    """Rounds, each of one message or several that follow each other.

    Raises:
        MalformedPayload: a round whose members did not all come.
    """
    found: list[Round] = []
    for part in map(round_from_proto, parts):
        if found and found[-1].number == part.number:
            part = replace(part, members=(*found.pop().members, *part.members))
        found.append(part)
    for one in found:
        if len(one.members) != one.size:
            raise MalformedPayload(
                f"round {one.number}: expected {one.size} members, got {len(one.members)}", hint="ask again"
            )
    return found


def round_from_proto(message: aggregator_pb2.Round) -> Round:
    """One round with the members of this message."""
    return Round(
        number=message.number,
        phase=_word(RoundPhase, aggregator_pb2.RoundPhase, message.phase),
        plan_version=message.plan_version,
        size=message.member_count,
        complete=message.complete_count,
        members=tuple(_member(member) for member in message.members),
        deadline_ms=message.deadline_ms,
        started_at_ms=message.started_at_ms,
        ended_at_ms=message.ended_at_ms,
        reason=message.reason,
        phase_seconds=_in_order(message.phase_seconds),
        average_bytes=message.average_bytes,
        cipher_bytes=message.cipher_bytes,
        total_weight=message.total_weight,
    )


def agent_from_proto(message: aggregator_pb2.Agent) -> RegisteredAgent:
    """A registered agent."""
    return RegisteredAgent(
        name=message.name,
        rank=message.rank,
        columns=tuple(message.encrypted_columns),
        budget=message.budget,
        version=message.version.package,
        last_seen_ms=message.last_seen_ms,
        connected=message.connected,
        task=_word(AgentTask, aggregator_pb2.AgentTask, message.task),
        examples=message.examples,
    )


def event_from_proto(message: aggregator_pb2.WatchEventsResponse) -> Event:
    """One event."""
    return Event(message.sequence, message.at_ms, message.kind, message.round, message.agent, message.detail)


def progress_from_proto(message: agent_pb2.WatchProgressResponse) -> AgentProgress:
    """What an agent is doing."""
    status = message.status
    name = agent_pb2.AgentActivity.Name(status.activity) if status.activity in agent_pb2.AgentActivity.values() else ""
    return AgentProgress(
        name=status.name,
        activity=name.removeprefix("AGENT_ACTIVITY_").lower() or "unknown",
        fraction=message.fraction,
        detail=message.detail,
        round=status.round,
        rounds=status.rounds,
        applied_round=status.applied_round,
        last_error=status.last_error,
        metrics=dict(status.metrics),
    )


def _member(message: aggregator_pb2.RoundMember) -> Member:
    return Member(
        agent=message.agent,
        rank=message.rank,
        columns=tuple(message.encrypted_columns),
        examples=message.examples,
        weight=message.weight,
        cipher_complete=message.cipher_complete,
        counted=message.counted,
        factors_bytes=message.factors_bytes,
        cipher_bytes=message.cipher_bytes,
        metrics=dict(message.metrics),
        left_reason=message.left_reason,
    )


def _in_order(phase_seconds: Mapping[str, float]) -> dict[str, float]:
    """Seconds by phase in the order of the protocol; the wire keeps none."""
    order = [phase.value for phase in RoundPhase]
    return {name: phase_seconds[name] for name in sorted(phase_seconds, key=lambda name: _position(order, name))}


def _position(order: Sequence[str], name: str) -> int:
    return order.index(name) if name in order else len(order)


def _word(words: type[Word], wire: Any, value: int) -> Word | None:
    """The word for a wire value: FEDERATION_STATE_RUNNING is "running"; None for 0."""
    if value == 0:
        return None
    by_name = {word.name: word for word in words}
    name = wire.Name(value) if value in wire.values() else ""
    for key, word in by_name.items():
        if name.endswith(f"_{key}"):
            return word
    raise MalformedPayload(
        f"{words.__name__}: expected one of {', '.join(sorted(by_name))}, got {name or value}",
        hint="install the same release on both sides",
    )
