"""Federations and rounds as an operator sees them, made of nothing."""

from __future__ import annotations

from services.operators.domain import Federation, FederationSpec, Member, Round
from shelora.he.parameters import CkksParameters
from shelora.plan import DenseShape, ModelShapes, ModuleShape, Negotiation, Plan
from shelora.rounds.phases import FederationState, RoundPhase

PARAMETERS = CkksParameters(
    ring_dimension=4096,
    modulus=1152921504606830593,
    modulus_bits=60,
    scale_bits=50,
    depth=0,
    security_bits=128,
)
SHAPES = ModelShapes(
    (ModuleShape("layer.0.query", 24, 32), ModuleShape("layer.0.value", 24, 32)), (DenseShape("head", (6, 24)),)
)


def make_plan() -> Plan:
    return Plan(
        federation="demo",
        version=1,
        epoch=1,
        shapes=SHAPES,
        cap=32,
        negotiation=Negotiation.ENCRYPTED,
        levels=((8, 32), (8, 32)),
        parameters_digest=PARAMETERS.digest(),
        values_per_block=PARAMETERS.values_per_block,
    )


def make_member(name: str, rank: int, k: int, *, counted: bool = True, **metrics: float) -> Member:
    return Member(
        agent=name,
        rank=rank,
        columns=(k, k),
        examples=100,
        weight=0.5,
        cipher_complete=counted,
        counted=counted,
        factors_bytes=1000,
        cipher_bytes=65536,
        metrics=metrics,
        left_reason="" if counted else "lost its power",
    )


def make_round(number: int, *members: Member, phase: RoundPhase = RoundPhase.PUBLISHED) -> Round:
    chosen = members or (
        make_member("agent-1", 4, 32, accuracy_before=0.2, accuracy_after=0.6, bytes_up=66_536.0),
        make_member("agent-2", 8, 8, accuracy_before=0.25, accuracy_after=0.7, bytes_up=66_536.0),
    )
    return Round(
        number=number,
        phase=phase,
        plan_version=1,
        size=len(chosen),
        complete=sum(member.cipher_complete for member in chosen),
        members=chosen,
        deadline_ms=0,
        started_at_ms=1_700_000_000_000,
        ended_at_ms=1_700_000_009_000,
        reason="",
        phase_seconds={"train": 5.0, "factors": 2.0, "basis": 0.5, "cipher": 1.0, "sum": 0.5},
        average_bytes=2048,
        cipher_bytes=65536,
        total_weight=1.0,
    )


def make_federation(
    state: FederationState = FederationState.RUNNING, *, planned: bool = True, found: Round | None = None
) -> Federation:
    return Federation(
        spec=FederationSpec("demo", 3, 2, 2, 1, PARAMETERS),
        state=state,
        plan=make_plan() if planned else None,
        round=found,
        last_published_round=1,
        agents=2,
        reason="",
        created_at_ms=1_700_000_000_000,
        shapes=SHAPES,
        task="sequence-classification",
    )
