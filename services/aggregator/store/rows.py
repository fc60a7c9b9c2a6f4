"""Rows to values and back; no queries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from sqlalchemy import RowMapping

from services.aggregator.domain import FederationSpec, Registration, Signature, SoftwareVersion
from shelora.he.parameters import CkksParameters
from shelora.plan.packing import Packing
from shelora.plan.plan import Negotiation
from shelora.plan.shapes import DenseShape, ModelShapes, ModuleShape
from shelora.rounds import Federation, FederationState, Member, PlanOutline, Round, RoundPhase, Rules, strategy_named

Row: TypeAlias = RowMapping

MILLISECONDS = 1000


@dataclass(frozen=True)
class StoredFederation:
    """A federation as it is stored.

    Attributes:
        spec: the specification as it was created.
        state: the state machine's state.
        parameters: CKKS parameters by key epoch.
        signature: what all agents have in common, None until one registered.
        revision: counted up by every change.
        next_sequence: number of the next event.
        created_at_ms: when it was created.
    """

    spec: FederationSpec
    state: Federation
    parameters: Mapping[int, CkksParameters]
    signature: Signature | None
    revision: int
    next_sequence: int
    created_at_ms: int

    @property
    def name(self) -> str:
        return self.spec.federation

    @property
    def present_spec(self) -> FederationSpec:
        """The specification with the rounds and the epoch that hold now."""
        epoch = self.state.epoch
        return replace(self.spec, rounds=self.state.rounds, epoch=epoch, parameters=self.parameters[epoch])


def new_federation(spec: FederationSpec, now_ms: int) -> StoredFederation:
    state = Federation(name=spec.federation, rules=rules_of(spec), rounds=spec.rounds, epoch=spec.epoch)
    return StoredFederation(spec, state, {spec.epoch: spec.parameters}, None, 1, 1, now_ms)


def rules_of(spec: FederationSpec) -> Rules:
    return Rules(
        target_agents=spec.target_agents,
        quorum=spec.quorum,
        gather_timeout_ms=spec.gather_timeout_s * MILLISECONDS,
        negotiate_timeout_ms=spec.negotiate_timeout_s * MILLISECONDS,
        train_timeout_ms=spec.train_timeout_s * MILLISECONDS,
        cipher_timeout_ms=spec.cipher_timeout_s * MILLISECONDS,
        negotiation=spec.negotiation,
        renegotiate_every=spec.renegotiate_every,
        basis_cap=spec.basis_cap,
        max_abandoned=spec.max_abandoned,
        strategy=strategy_named(spec.strategy),
    )


def spec_row(spec: FederationSpec) -> dict[str, Any]:
    return {
        "name": spec.federation,
        "spec_rounds": spec.rounds,
        "spec_epoch": spec.epoch,
        "target_agents": spec.target_agents,
        "quorum": spec.quorum,
        "negotiation": spec.negotiation.value,
        "renegotiate_every": spec.renegotiate_every,
        "gather_timeout_s": spec.gather_timeout_s,
        "negotiate_timeout_s": spec.negotiate_timeout_s,
        "train_timeout_s": spec.train_timeout_s,
        "cipher_timeout_s": spec.cipher_timeout_s,
        "basis_cap": spec.basis_cap,
        "max_abandoned": spec.max_abandoned,
        "strategy": spec.strategy,
        "packing": spec.packing.value,
    }


def read_spec(row: Row, parameters: Mapping[int, CkksParameters]) -> FederationSpec:
    return FederationSpec(
        federation=row["name"],
        rounds=row["spec_rounds"],
        target_agents=row["target_agents"],
        quorum=row["quorum"],
        epoch=row["spec_epoch"],
        parameters=parameters[row["spec_epoch"]],
        negotiation=Negotiation(row["negotiation"]),
        renegotiate_every=row["renegotiate_every"],
        gather_timeout_s=row["gather_timeout_s"],
        negotiate_timeout_s=row["negotiate_timeout_s"],
        train_timeout_s=row["train_timeout_s"],
        cipher_timeout_s=row["cipher_timeout_s"],
        basis_cap=row["basis_cap"],
        max_abandoned=row["max_abandoned"],
        strategy=row["strategy"],
        packing=Packing(row["packing"]),
    )


def state_row(state: Federation) -> dict[str, Any]:
    return {
        "state": state.state.value,
        "reason": state.reason,
        "deadline_ms": state.deadline_ms,
        "rounds": state.rounds,
        "epoch": state.epoch,
        "next_epoch": state.next_epoch,
        "plan_version": 0 if state.plan is None else state.plan.version,
        "round": 0 if state.round is None else state.round.number,
        "published": state.published,
        "last_published_round": state.last_published_round,
        "abandoned_in_a_row": state.abandoned_in_a_row,
    }


def read_state(row: Row, spec: FederationSpec) -> Federation:
    """The state without agents, plan, ballot and round, which have rows of their own."""
    return Federation(
        name=spec.federation,
        rules=rules_of(spec),
        rounds=row["rounds"],
        epoch=row["epoch"],
        state=FederationState(row["state"]),
        next_epoch=row["next_epoch"],
        deadline_ms=row["deadline_ms"],
        published=row["published"],
        last_published_round=row["last_published_round"],
        abandoned_in_a_row=row["abandoned_in_a_row"],
        reason=row["reason"],
    )


def parameters_row(parameters: CkksParameters) -> dict[str, Any]:
    return {
        "ring_dimension": parameters.ring_dimension,
        "modulus": parameters.modulus,
        "modulus_bits": parameters.modulus_bits,
        "scale_bits": parameters.scale_bits,
        "security_bits": parameters.security_bits,
        "depth": parameters.depth,
    }


def read_parameters(row: Row) -> CkksParameters:
    return CkksParameters(
        ring_dimension=row["ring_dimension"],
        modulus=row["modulus"],
        modulus_bits=row["modulus_bits"],
        scale_bits=row["scale_bits"],
        security_bits=row["security_bits"],
        depth=row["depth"],
    )


def signature_row(signature: Signature | None) -> dict[str, Any]:
    if signature is None:
        names = ("shapes", "base_model_digest", "tokenizer_digest", "task", "labels_digest")
        return dict.fromkeys(names)
    shapes = {
        "modules": [[module.name, module.out_features, module.in_features] for module in signature.shapes.modules],
        "dense": [[tensor.name, list(tensor.shape)] for tensor in signature.shapes.dense],
    }
    return {
        "shapes": shapes,
        "base_model_digest": signature.base_model_digest,
        "tokenizer_digest": signature.tokenizer_digest,
        "task": signature.task,
        "labels_digest": signature.labels_digest,
    }


def read_signature(row: Row) -> Signature | None:
    shapes = row["shapes"]
    if shapes is None:
        return None
    return Signature(
        shapes=ModelShapes(
            modules=tuple(ModuleShape(*module) for module in shapes["modules"]),
            dense=tuple(DenseShape(name, tuple(shape)) for name, shape in shapes["dense"]),
        ),
        base_model_digest=row["base_model_digest"],
        tokenizer_digest=row["tokenizer_digest"],
        task=row["task"],
        labels_digest=row["labels_digest"],
    )


def registration_row(registration: Registration, selective: bool, now_ms: int) -> dict[str, Any]:
    return {
        "rank": registration.rank,
        "columns": list(registration.columns),
        "selective": selective,
        "budget": registration.budget,
        "package_version": registration.version.package,
        "protocol": registration.version.protocol,
        "epoch": registration.epoch,
        "parameters_digest": registration.parameters_digest,
        "examples": registration.examples,
        "last_seen_ms": now_ms,
    }


def read_version(row: Row) -> SoftwareVersion:
    return SoftwareVersion(row["package_version"], row["protocol"])


def plan_row(plan: PlanOutline, attempt: int) -> dict[str, Any]:
    return {
        "epoch": plan.epoch,
        "cap": plan.cap,
        "levels": [list(levels) for levels in plan.levels],
        "negotiation": plan.negotiation.value,
        "settled": plan.settled,
        "published_before": plan.published_before,
        "negotiated_by": plan.negotiated_by,
        "attempt": attempt,
    }


def read_plan(row: Row) -> PlanOutline:
    return PlanOutline(
        version=row["version"],
        epoch=row["epoch"],
        cap=row["cap"],
        levels=tuple(tuple(levels) for levels in row["levels"]),
        negotiation=Negotiation(row["negotiation"]),
        settled=row["settled"],
        published_before=row["published_before"],
        negotiated_by=row["negotiated_by"],
    )


def round_row(round_: Round) -> dict[str, Any]:
    return {
        "phase": round_.phase.value,
        "plan_version": round_.plan_version,
        "started_at_ms": round_.started_at_ms,
        "phase_started_ms": round_.phase_started_ms,
        "deadline_ms": round_.deadline_ms,
        "ended_at_ms": round_.ended_at_ms,
        "reason": round_.reason,
        "phase_ms": {phase.value: spent for phase, spent in round_.phase_ms.items()},
    }


def read_round(row: Row, members: Mapping[str, Member]) -> Round:
    return Round(
        number=row["number"],
        phase=RoundPhase(row["phase"]),
        plan_version=row["plan_version"],
        started_at_ms=row["started_at_ms"],
        phase_started_ms=row["phase_started_ms"],
        deadline_ms=row["deadline_ms"],
        ended_at_ms=row["ended_at_ms"],
        reason=row["reason"],
        members=members,
        phase_ms={RoundPhase(phase): spent for phase, spent in row["phase_ms"].items()},
    )


def member_row(member: Member) -> dict[str, Any]:
    return {
        "rank": member.rank,
        "columns": list(member.columns),
        "examples": member.examples,
        "uploaded": member.uploaded,
        "in_cohort": member.in_cohort,
        "complete": member.complete,
        "folded": member.folded,
        "counted": member.counted,
        "left_reason": member.left_reason,
    }


def read_member(row: Row) -> Member:
    return Member(
        agent=row["agent"],
        rank=row["rank"],
        columns=tuple(row["columns"]),
        examples=row["examples"],
        uploaded=row["uploaded"],
        in_cohort=row["in_cohort"],
        complete=row["complete"],
        folded=row["folded"],
        counted=row["counted"],
        left_reason=row["left_reason"],
    )
