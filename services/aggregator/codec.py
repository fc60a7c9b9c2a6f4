"""Wire messages to domain values and back. Nothing else in the service knows generated types but the servicer.

What comes in is checked here as far as one message alone can tell; the service checks it against its state.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Final

from services.aggregator.domain import (
    AgentSummary,
    AgentView,
    Download,
    DownloadRequest,
    Event,
    FederationSpec,
    FederationSummary,
    MemberSummary,
    PayloadKind,
    Registration,
    RoundSummary,
    Signature,
    SoftwareVersion,
    Terms,
    UploadTicket,
)
from services.common.codec import (
    negotiation_from_proto,
    negotiation_to_proto,
    packing_from_proto,
    packing_to_proto,
    parameters_from_proto,
    parameters_to_proto,
    plan_to_proto,
    shapes_from_proto,
    shapes_to_proto,
)
from services.common.identity import check_name
from services.common.transfer import check_header
from services.common.versions import own_version
from shelora.errors import InvalidIdentifier, MalformedPayload
from shelora.rounds.phases import AgentTask, FederationState, RoundPhase
from shelora.v1 import aggregator_pb2, types_pb2

_DIGEST_BYTES: Final = 32
_PART_BYTES: Final = 1 << 20
_TEXT_BYTES: Final = 64
_VERSION_BYTES: Final = 32

_STATES: Final = {
    state: aggregator_pb2.FederationState.Value(f"FEDERATION_STATE_{state.name}") for state in FederationState
}
_PHASES: Final = {phase: aggregator_pb2.RoundPhase.Value(f"ROUND_PHASE_{phase.name}") for phase in RoundPhase}
_TASKS: Final = {task: aggregator_pb2.AgentTask.Value(f"AGENT_TASK_{task.name}") for task in AgentTask}
_KINDS: Final = {aggregator_pb2.PayloadKind.Value(f"PAYLOAD_KIND_{kind.name}"): kind for kind in PayloadKind}


def spec_from_proto(message: aggregator_pb2.FederationSpec) -> FederationSpec:
    """A specification; its bounds are checked by the service.

    Raises:
        InvalidConfiguration, DigestMismatch, InvalidPlan: bad CKKS parameters, negotiation or packing.
    """
    return FederationSpec(
        federation=message.federation,
        rounds=message.rounds,
        target_agents=message.target_agents,
        quorum=message.quorum,
        epoch=message.epoch,
        parameters=parameters_from_proto(message.parameters),
        negotiation=negotiation_from_proto(message.negotiation),
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


def registration_from_proto(message: aggregator_pb2.RegisterAgentRequest) -> Registration:
    """A registration; its numbers are checked by the service.

    Raises:
        InvalidIdentifier, InvalidPlan, MalformedPayload: a bad name, shape or digest.
    """
    signature = message.signature
    return Registration(
        federation=check_name(message.federation, "federation"),
        version=SoftwareVersion(_text("version", message.version.package, _VERSION_BYTES), message.version.protocol),
        rank=message.rank,
        columns=tuple(message.encrypted_columns),
        budget=_text("budget", message.budget, _TEXT_BYTES),
        signature=Signature(
            shapes=shapes_from_proto(signature.shapes),
            base_model_digest=_digest("base_model_digest", signature.base_model_digest),
            tokenizer_digest=_digest("tokenizer_digest", signature.tokenizer_digest),
            task=_text("task", signature.task, _TEXT_BYTES),
            labels_digest=_digest("labels_digest", signature.labels_digest, optional=True),
        ),
        epoch=message.epoch,
        parameters_digest=_digest("parameters_digest", message.parameters_digest),
        examples=message.examples,
    )


def ticket_from_proto(message: aggregator_pb2.UploadHeader) -> UploadTicket:
    """An upload's header; the service compares it with the plan.

    Raises:
        InvalidIdentifier, MalformedPayload, PayloadTooLarge: a bad name, kind, digest or size.
    """
    kind = _kind(message.kind)
    check_header(message.payload)
    return UploadTicket(
        federation=check_name(message.federation, "federation"),
        kind=kind,
        round=message.round,
        plan_version=message.plan_version,
        epoch=message.epoch,
        plan_digest=_digest("plan_digest", message.plan_digest),
        size_bytes=message.payload.size_bytes,
        digest=message.payload.digest,
        layout_digest=_digest("layout_digest", message.layout_digest, optional=kind is not PayloadKind.CIPHER),
        examples=message.examples,
        metrics=dict(message.metrics),
    )


def download_from_proto(message: aggregator_pb2.DownloadRequest) -> DownloadRequest:
    """What to download.

    Raises:
        InvalidIdentifier, MalformedPayload: a bad federation name or kind.
    """
    return DownloadRequest(
        federation=check_name(message.federation, "federation"),
        kind=_kind(message.kind),
        round=message.round,
        plan_version=message.plan_version,
        offset=message.offset,
    )


def federation_to_proto(federation: FederationSummary) -> aggregator_pb2.Federation:
    """A federation."""
    message = aggregator_pb2.Federation(
        spec=_spec_to_proto(federation.spec),
        state=_STATES[federation.state],
        last_published_round=federation.last_published_round,
        agents=federation.agents,
        reason=federation.reason,
        created_at_ms=federation.created_at_ms,
    )
    if federation.plan is not None:
        message.plan.CopyFrom(plan_to_proto(federation.plan, federation.negotiated_by))
    if federation.round is not None:
        message.round.CopyFrom(_round_to_proto(federation.round))
    if federation.signature is not None:
        message.signature.CopyFrom(_signature_to_proto(federation.signature))
    return message


def agent_to_proto(agent: AgentSummary) -> aggregator_pb2.Agent:
    """A registered agent."""
    return aggregator_pb2.Agent(
        name=agent.name,
        rank=agent.rank,
        encrypted_columns=agent.columns,
        budget=agent.budget,
        version=types_pb2.SoftwareVersion(package=agent.version.package, protocol=agent.version.protocol),
        last_seen_ms=agent.last_seen_ms,
        connected=agent.connected,
        task=_TASKS[agent.task],
        examples=agent.examples,
    )


def round_parts(summary: RoundSummary) -> Iterator[aggregator_pb2.Round]:
    """A round in as many messages as its members need."""
    part = _round_to_proto(summary)
    size_bytes = 0
    for member in map(_member_to_proto, summary.members):
        size_bytes += member.ByteSize()
        if size_bytes > _PART_BYTES and part.members:
            yield part
            part, size_bytes = _round_to_proto(summary), member.ByteSize()
        part.members.append(member)
    yield part


def _round_to_proto(summary: RoundSummary) -> aggregator_pb2.Round:
    """A round without its members."""
    return aggregator_pb2.Round(
        number=summary.number,
        phase=_PHASES[summary.phase],
        plan_version=summary.plan_version,
        deadline_ms=summary.deadline_ms,
        started_at_ms=summary.started_at_ms,
        ended_at_ms=summary.ended_at_ms,
        reason=summary.reason,
        phase_seconds=summary.phase_seconds,
        average_bytes=summary.average_bytes,
        cipher_bytes=summary.cipher_bytes,
        total_weight=summary.total_weight,
        member_count=len(summary.members),
        complete_count=sum(member.cipher_complete for member in summary.members),
    )


def terms_to_proto(terms: Terms) -> aggregator_pb2.GetTermsResponse:
    """What an agent has to know before it registers."""
    return aggregator_pb2.GetTermsResponse(
        epoch=terms.epoch, basis_cap=terms.basis_cap, packing=packing_to_proto(terms.packing), version=own_version()
    )


def view_to_proto(view: AgentView) -> aggregator_pb2.AgentView:
    """An agent's view."""
    message = aggregator_pb2.AgentView(
        state=_STATES[view.state],
        task=_TASKS[view.task],
        round=view.round,
        phase=aggregator_pb2.ROUND_PHASE_UNSPECIFIED if view.phase is None else _PHASES[view.phase],
        deadline_ms=view.deadline_ms,
        last_published_round=view.last_published_round,
        rounds=view.rounds,
        vote_columns=view.vote_columns,
        reason=view.reason,
        now_ms=view.now_ms,
        come_back_ms=view.come_back_ms,
    )
    if view.plan is not None:
        message.plan.CopyFrom(plan_to_proto(view.plan, view.negotiated_by))
    return message


def download_to_proto(download: Download) -> aggregator_pb2.DownloadHeader:
    """The header before a download's chunks."""
    return aggregator_pb2.DownloadHeader(
        payload=types_pb2.PayloadHeader(size_bytes=download.blob.size_bytes, digest=download.blob.digest),
        plan_version=download.plan.version,
        epoch=download.plan.epoch,
        layout_digest=download.layout_digest,
        cohort=_cohort_to_proto(tuple((member.agent, member.rank, member.counted) for member in download.cohort)),
        weight=download.weight,
        total_weight=download.total_weight,
        plan=plan_to_proto(download.plan, download.negotiated_by),
        first_plain=download.first_plain,
    )


@lru_cache(maxsize=16)
def _cohort_to_proto(members: tuple[tuple[str, int, bool], ...]) -> list[aggregator_pb2.CohortMember]:
    """Name, rank and whether it counts, of every member: the same for each of what may be thousands of them."""
    return [aggregator_pb2.CohortMember(agent=agent, rank=rank, counted=counted) for agent, rank, counted in members]


def event_to_proto(event: Event) -> aggregator_pb2.WatchEventsResponse:
    """An event."""
    return aggregator_pb2.WatchEventsResponse(
        sequence=event.sequence,
        at_ms=event.at_ms,
        kind=event.kind,
        round=event.round,
        agent=event.agent,
        detail=event.detail,
    )


def _spec_to_proto(spec: FederationSpec) -> aggregator_pb2.FederationSpec:
    return aggregator_pb2.FederationSpec(
        federation=spec.federation,
        rounds=spec.rounds,
        target_agents=spec.target_agents,
        quorum=spec.quorum,
        negotiation=negotiation_to_proto(spec.negotiation),
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


def _signature_to_proto(signature: Signature) -> types_pb2.ModelSignature:
    return types_pb2.ModelSignature(
        shapes=shapes_to_proto(signature.shapes),
        base_model_digest=signature.base_model_digest,
        tokenizer_digest=signature.tokenizer_digest,
        task=signature.task,
        labels_digest=signature.labels_digest,
    )


def _member_to_proto(member: MemberSummary) -> aggregator_pb2.RoundMember:
    return aggregator_pb2.RoundMember(
        agent=member.agent,
        rank=member.rank,
        encrypted_columns=member.columns,
        examples=member.examples,
        weight=member.weight,
        cipher_complete=member.cipher_complete,
        counted=member.counted,
        factors_bytes=member.factors_bytes,
        cipher_bytes=member.cipher_bytes,
        metrics=member.metrics,
        left_reason=member.left_reason,
    )


def _kind(value: int) -> PayloadKind:
    found = _KINDS.get(value)  # type: ignore[call-overload]  # any int may come from the wire
    if found is None:
        raise MalformedPayload(f"payload kind: expected 1 to {len(_KINDS)}, got {value}")
    return PayloadKind(found)


def _digest(what: str, value: bytes, *, optional: bool = False) -> bytes:
    if len(value) != _DIGEST_BYTES and not (optional and not value):
        raise MalformedPayload(f"{what}: expected {_DIGEST_BYTES} bytes, got {len(value)}")
    return value


def _text(what: str, value: str, limit_bytes: int) -> str:
    size = len(value.encode())
    if size > limit_bytes or not (value == "" or value.isprintable()):
        raise InvalidIdentifier(f"{what}: expected at most {limit_bytes} printable bytes, got {size} bytes")
    return value
