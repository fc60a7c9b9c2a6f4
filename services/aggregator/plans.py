"""From what the state machine decided to the plan that aggregator and agents compare, and what follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from services.aggregator.domain import Signature
from services.aggregator.store import StoredFederation
from shelora.errors import CorruptState
from shelora.plan.layout import SlotLayout
from shelora.plan.packing import Packing
from shelora.plan.plan import Plan
from shelora.plan.shapes import ModelShapes
from shelora.rounds import PlanOutline, Round


def plan_of(stored: StoredFederation, outline: PlanOutline) -> Plan:
    """The plan of one version."""
    parameters = stored.parameters[outline.epoch]
    return _plan(
        stored.name,
        outline,
        signature_of(stored).shapes,
        parameters.digest(),
        values_per_block=parameters.values_per_block,
        packing=stored.spec.packing,
    )


def present_plan(stored: StoredFederation) -> Plan | None:
    """The plan in force or being negotiated."""
    outline = stored.state.plan
    return None if outline is None else plan_of(stored, outline)


def signature_of(stored: StoredFederation) -> Signature:
    """What all agents have in common, once there are any.

    Raises:
        CorruptState: a plan without a registered agent.
    """
    if stored.signature is None:
        raise CorruptState(
            f"expected a registered agent in {stored.name}, got none", hint="restore the database from a backup"
        )
    return stored.signature


@lru_cache(maxsize=64)
def _plan(
    federation: str,
    outline: PlanOutline,
    shapes: ModelShapes,
    parameters_digest: bytes,
    *,
    values_per_block: int,
    packing: Packing,
) -> Plan:
    return Plan(
        federation=federation,
        version=outline.version,
        epoch=outline.epoch,
        shapes=shapes,
        cap=outline.cap,
        negotiation=outline.negotiation,
        levels=outline.levels,
        parameters_digest=parameters_digest,
        values_per_block=values_per_block,
        packing=packing,
    )


def cohort_layout(plan: Plan, round_: Round) -> SlotLayout:
    """The slots of a round whose cohort is closed."""
    return _layout(plan, round_.ranks)


def layout_digest(plan: Plan, round_: Round) -> bytes:
    """Digest of the slots of a round whose cohort is closed."""
    return _layout_digest(plan, round_.ranks)


def sum_blocks(plan: Plan, round_: Round) -> int:
    """Blocks of the running sum: enough for the largest ciphertext of the cohort, whoever counts in the end."""
    layout = cohort_layout(plan, round_)
    return max(layout.blocks(member.columns) for member in round_.cohort)


def sensitivity_blocks(plan: Plan) -> int:
    """Blocks of the encrypted sensitivities: one value per column of every module."""
    return -(-sum(module.in_features for module in plan.shapes.modules) // plan.values_per_block)


def widths(shapes: ModelShapes) -> tuple[int, ...]:
    """Input width of every module."""
    return tuple(module.in_features for module in shapes.modules)


def is_selective(columns: Sequence[int], shapes: ModelShapes) -> bool:
    """Whether some module is encrypted in part, so that it matters which columns come first."""
    return any(0 < k < n for k, n in zip(columns, widths(shapes), strict=True))


@lru_cache(maxsize=16)
def _layout(plan: Plan, ranks: tuple[int, ...]) -> SlotLayout:
    return plan.layout(ranks)


@lru_cache(maxsize=64)
def _layout_digest(plan: Plan, ranks: tuple[int, ...]) -> bytes:
    return _layout(plan, ranks).digest()
