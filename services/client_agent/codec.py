"""Wire messages to the agent's domain values and back."""

from __future__ import annotations

from pathlib import Path

from services.client_agent.domain import (
    Activity,
    Member,
    PayloadKind,
    Received,
    Registration,
    Signature,
    Status,
    Terms,
    Upload,
    View,
)
from services.common.codec import packing_from_proto, plan_from_proto, shapes_to_proto
from services.common.versions import own_version
from shelora.errors import VersionMismatch
from shelora.rounds.phases import AgentTask, FederationState, RoundPhase
from shelora.v1 import agent_pb2, aggregator_pb2, types_pb2

KIND_TO_WIRE = {kind: aggregator_pb2.PayloadKind.Value(f"PAYLOAD_KIND_{kind.name}") for kind in PayloadKind}
_TASKS = {aggregator_pb2.AgentTask.Value(f"AGENT_TASK_{task.name}"): task for task in AgentTask}
_STATES = {aggregator_pb2.FederationState.Value(f"FEDERATION_STATE_{state.name}"): state for state in FederationState}
_PHASES = {aggregator_pb2.RoundPhase.Value(f"ROUND_PHASE_{phase.name}"): phase for phase in RoundPhase}
_ACTIVITIES = {activity: agent_pb2.AgentActivity.Value(f"AGENT_ACTIVITY_{activity.name}") for activity in Activity}
_ACTIVITY_FROM_WIRE = {wire: activity for activity, wire in _ACTIVITIES.items()}


def terms_from_proto(message: aggregator_pb2.GetTermsResponse) -> Terms:
    """What to know before registering.

    Raises:
        InvalidPlan: a packing this version does not know.
    """
    return Terms(message.epoch, message.basis_cap, packing_from_proto(message.packing))


def view_from_proto(message: aggregator_pb2.AgentView) -> View:
    """The agent's view.

    Raises:
        VersionMismatch: a task or state this version does not know.
        InvalidPlan, DigestMismatch: a plan that does not hold together.
    """
    if message.task not in _TASKS or message.state not in _STATES:
        raise VersionMismatch(
            f"the aggregator asks for task {message.task} in state {message.state}, unknown here",
            hint="run the same version of shelora on both sides",
        )
    return View(
        state=_STATES[message.state],
        task=_TASKS[message.task],
        round=message.round,
        phase=_PHASES.get(message.phase),
        plan=plan_from_proto(message.plan) if message.HasField("plan") else None,
        deadline_ms=message.deadline_ms,
        last_published_round=message.last_published_round,
        rounds=message.rounds,
        vote_columns=tuple(message.vote_columns),
        reason=message.reason,
        now_ms=message.now_ms,
        come_back_ms=message.come_back_ms,
    )


def signature_to_proto(signature: Signature) -> types_pb2.ModelSignature:
    """What all agents of the federation have in common."""
    return types_pb2.ModelSignature(
        shapes=shapes_to_proto(signature.shapes),
        base_model_digest=signature.base_model_digest,
        tokenizer_digest=signature.tokenizer_digest,
        task=signature.task,
        labels_digest=signature.labels_digest,
    )


def registration_to_proto(federation: str, registration: Registration) -> aggregator_pb2.RegisterAgentRequest:
    """The registration call."""
    return aggregator_pb2.RegisterAgentRequest(
        federation=federation,
        version=own_version(),
        rank=registration.rank,
        encrypted_columns=registration.columns,
        budget=registration.budget,
        signature=signature_to_proto(registration.signature),
        epoch=registration.epoch,
        parameters_digest=registration.parameters_digest,
        examples=registration.examples,
    )


def upload_to_proto(federation: str, upload: Upload, payload: types_pb2.PayloadHeader) -> aggregator_pb2.UploadHeader:
    """The header of an upload."""
    return aggregator_pb2.UploadHeader(
        federation=federation,
        round=upload.round,
        plan_version=upload.plan.version,
        kind=KIND_TO_WIRE[upload.kind],
        payload=payload,
        epoch=upload.plan.epoch,
        plan_digest=upload.plan.digest(),
        layout_digest=upload.layout_digest,
        examples=upload.examples,
        metrics=dict(upload.metrics),
    )


def received_from_proto(header: aggregator_pb2.DownloadHeader, path: Path) -> Received:
    """A download's header.

    Raises:
        InvalidPlan, DigestMismatch: a plan that does not hold together.
    """
    return Received(
        path=path,
        size_bytes=header.payload.size_bytes,
        plan=plan_from_proto(header.plan),
        layout_digest=header.layout_digest,
        cohort=tuple(Member(member.agent, member.rank, member.counted) for member in header.cohort),
        weight=header.weight,
        total_weight=header.total_weight,
        first_plain=tuple(header.first_plain),
    )


def status_to_proto(status: Status) -> agent_pb2.AgentStatus:
    """The agent at a glance."""
    return agent_pb2.AgentStatus(
        name=status.name,
        federation=status.federation,
        activity=_ACTIVITIES[status.activity],
        round=status.round,
        rounds=status.rounds,
        applied_round=status.applied_round,
        rank=status.rank,
        budget=status.budget,
        metrics=dict(status.metrics),
        last_error=status.last_error,
        version=own_version(),
        paused=status.paused,
        sent_rank=status.sent_rank,
    )


def status_from_proto(message: agent_pb2.AgentStatus, fraction: float = 0.0, detail: str = "") -> Status:
    """The agent at a glance.

    Raises:
        VersionMismatch: an activity this version does not know.
    """
    activity = _ACTIVITY_FROM_WIRE.get(message.activity)
    if activity is None:
        raise VersionMismatch(
            f"the agent reports activity {message.activity}, unknown here",
            hint="use the same version of shelora as the agent",
        )
    return Status(
        name=message.name,
        federation=message.federation,
        rank=message.rank,
        budget=message.budget,
        activity=activity,
        fraction=fraction,
        detail=detail,
        round=message.round,
        rounds=message.rounds,
        applied_round=message.applied_round,
        metrics=dict(message.metrics),
        last_error=message.last_error,
        paused=message.paused,
        sent_rank=message.sent_rank,
    )
