"""What the dashboard and scripts may read over HTTP, as plain JSON values: names, sizes, times; nothing secret."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from services.aggregator.domain import AgentSummary, FederationSummary, MemberSummary, RoundSummary
from services.aggregator.plans import widths

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
        "round": None if federation.round is None else round_json(federation.round, _columns_of(federation)),
    }


def agent_json(agent: AgentSummary, all_columns: int) -> Json:
    """A registered agent."""
    return {
        "name": agent.name,
        "rank": agent.rank,
        "budget": agent.budget,
        "encrypted_share": encrypted_share(agent.columns, all_columns),
        "connected": agent.connected,
        "task": agent.task.value,
        "examples": agent.examples,
        "last_seen_ms": agent.last_seen_ms,
        "version": agent.version.package,
    }


def round_json(summary: RoundSummary, all_columns: int) -> Json:
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
        "members": [_member_json(member, all_columns) for member in summary.members],
    }


def encrypted_share(columns: Sequence[int], all_columns: int) -> float:
    """Part of all columns that is encrypted, 0 to 1; 0 while no model is known."""
    return sum(columns) / all_columns if all_columns else 0.0


def _columns_of(federation: FederationSummary) -> int:
    return 0 if federation.signature is None else sum(widths(federation.signature.shapes))


def _member_json(member: MemberSummary, all_columns: int) -> Json:
    return {
        "agent": member.agent,
        "rank": member.rank,
        "encrypted_share": encrypted_share(member.columns, all_columns),
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
        "columns": _columns_of(federation),
    }
