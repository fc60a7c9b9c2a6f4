"""What the dashboard and scripts may read over HTTP, as plain JSON values: names, sizes, times; nothing secret."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from services.aggregator.domain import AgentSummary, FederationSummary, MemberSummary, RoundSummary

Json = dict[str, Any]


def federation_json(federation: FederationSummary) -> Json:
    """A federation with its plan and its running or last round."""
    spec, plan = federation.spec, federation.plan
    return {
        "federation": spec.federation,
        "state": federation.state.value,
        "reason": federation.reason,
        "created_at_ms": federation.created_at_ms,
        "rounds": spec.rounds,
        "last_published_round": federation.last_published_round,
        "agents": federation.agents,
        "target_agents": spec.target_agents,
        "quorum": spec.quorum,
        "negotiation": spec.negotiation.value,
        "strategy": spec.strategy,
        "packing": spec.packing.value,
        "epoch": spec.epoch if plan is None else plan.epoch,
        "parameters": {
            "ring_dimension": spec.parameters.ring_dimension,
            "modulus_bits": spec.parameters.modulus_bits,
            "scale_bits": spec.parameters.scale_bits,
            "security_bits": spec.parameters.security_bits,
        },
        "plan": None
        if plan is None
        else {"version": plan.version, "basis_cap": plan.cap, "digest": plan.digest().hex()},
        "model": _model_json(federation),
        "round": None if federation.round is None else round_json(federation.round, widths_of(federation)),
    }


def agent_json(agent: AgentSummary, widths: Sequence[int]) -> Json:
    """A registered agent."""
    return {
        "name": agent.name,
        "rank": agent.rank,
        "budget": agent.budget,
        "encrypted_share": encrypted_share(agent.columns, widths),
        "connected": agent.connected,
        "task": agent.task.value,
        "examples": agent.examples,
        "last_seen_ms": agent.last_seen_ms,
        "version": agent.version.package,
    }


def round_json(summary: RoundSummary, widths: Sequence[int]) -> Json:
    """A round with its members."""
    return {
        "number": summary.number,
        "phase": summary.phase.value,
        "plan_version": summary.plan_version,
        "deadline_ms": summary.deadline_ms,
        "started_at_ms": summary.started_at_ms,
        "ended_at_ms": summary.ended_at_ms,
        "reason": summary.reason,
        "phase_seconds": dict(summary.phase_seconds),
        "average_bytes": summary.average_bytes,
        "cipher_bytes": summary.cipher_bytes,
        "total_weight": summary.total_weight,
        "members": [_member_json(member, widths) for member in summary.members],
    }


def widths_of(federation: FederationSummary) -> tuple[int, ...]:
    """Columns of every module, once a model is known."""
    if federation.signature is None:
        return ()
    return tuple(module.in_features for module in federation.signature.shapes.modules)


def encrypted_share(columns: Sequence[int], widths: Sequence[int]) -> float:
    """Part of all columns that is encrypted, 0 to 1."""
    return sum(columns) / sum(widths) if sum(widths) else 0.0


def _member_json(member: MemberSummary, widths: Sequence[int]) -> Json:
    return {
        "agent": member.agent,
        "rank": member.rank,
        "encrypted_share": encrypted_share(member.columns, widths),
        "examples": member.examples,
        "weight": member.weight,
        "cipher_complete": member.cipher_complete,
        "counted": member.counted,
        "factors_bytes": member.factors_bytes,
        "cipher_bytes": member.cipher_bytes,
        "metrics": dict(member.metrics),
        "left_reason": member.left_reason,
    }


def _model_json(federation: FederationSummary) -> Json | None:
    signature = federation.signature
    if signature is None:
        return None
    return {
        "task": signature.task,
        "base_model_digest": signature.base_model_digest.hex(),
        "modules": len(signature.shapes.modules),
        "dense_tensors": len(signature.shapes.dense),
        "columns": sum(module.in_features for module in signature.shapes.modules),
    }
