"""Settings that cannot work, refused with the reason before anything starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from services.operators.planning.costs import AgentCost
from services.operators.planning.rates import Rates
from services.operators.planning.terms import PAYLOAD_LIMIT_BYTES, Participant, Terms
from shelora.errors import InvalidConfiguration, InvalidPlan, PayloadTooLarge, RankMismatch, ValueOutOfRange
from shelora.he.parameters import CkksParameters
from shelora.plan import BudgetKind, ModelShapes, Negotiation, SlotLayout, check_packing, parse_budget
from shelora.plan.negotiation import MAX_PACKED_VALUE, PACKED_STEP

MOST_RANK: Final = 1024
MOST_CAP: Final = 4096
MOST_AGENTS: Final = 100_000
MOST_EXAMPLES: Final = 10**12


def check_terms(terms: Terms, agents: int) -> None:
    """Refuse terms that no federation of so many agents can have.

    Args:
        terms: of the federation.
        agents: in its largest cohort.

    Raises:
        InvalidPlan: too many agents, an impossible cap, or a packing that such a cohort cannot add up.
    """
    if not 1 <= agents <= MOST_AGENTS:
        raise InvalidPlan(f"expected 1 to {MOST_AGENTS} agents, got {agents}", hint="split the federation")
    if not 0 <= terms.cap <= MOST_CAP:
        raise InvalidPlan(f"expected a basis cap of 0 to {MOST_CAP}, got {terms.cap}", hint="0 is 4 x largest rank")
    check_packing(terms.packing, terms.parameters, agents)
    if terms.negotiation is Negotiation.ENCRYPTED:
        check_negotiation(terms.parameters, agents)


def check_negotiation(parameters: CkksParameters, agents: int) -> None:
    """Refuse an encrypted negotiation whose sums do not fit a ciphertext, or drown in its noise.

    Raises:
        InvalidPlan: too many agents for these parameters.
    """
    fits = agents * MAX_PACKED_VALUE < parameters.max_abs_value
    if not fits or 2 * parameters.error_bound(agents) >= PACKED_STEP:
        most = int(parameters.max_abs_value / MAX_PACKED_VALUE) - 1
        raise InvalidPlan(
            f"expected at most {most:,} agents whose sensitivities are added under encryption, got {agents:,}",
            hint="give every agent the budget full, which needs no negotiation, or choose --negotiation ope",
            context={"field": "negotiation"},
        )


def check_participants(shapes: ModelShapes, participants: Sequence[Participant], terms: Terms) -> None:
    """Refuse agents that cannot take part on these terms.

    Raises:
        InvalidConfiguration: there are none.
        RankMismatch: a rank larger than a module, or than the cap.
        ValueOutOfRange: an impossible number of examples.
        InvalidPlan: budgets that the negotiation cannot serve.
    """
    if not participants:
        raise InvalidConfiguration("plan explain: expected at least one agent, got none", hint="give --ranks 4,8,16")
    narrowest = min(shapes.modules, key=lambda module: min(module.out_features, module.in_features), default=None)
    side = MOST_RANK if narrowest is None else min(narrowest.out_features, narrowest.in_features, MOST_RANK)
    for one in participants:
        if not 1 <= one.rank <= side:
            where = f", the smaller side of {narrowest.name!r}" if narrowest and side < MOST_RANK else ""
            raise RankMismatch(
                f"{one.name}: expected a rank of 1 to {side}{where}, got {one.rank}",
                hint="lower the rank, or leave that module out of the LoRA targets",
                context={"agent": one.name},
            )
        if not 1 <= one.examples <= MOST_EXAMPLES:
            raise ValueOutOfRange(f"{one.name}: expected 1 to {MOST_EXAMPLES} local texts, got {one.examples}")
    largest = max(one.rank for one in participants)
    if terms.cap_for([largest]) < largest:
        raise InvalidPlan(
            f"expected a basis cap of at least the largest rank ({largest}), got {terms.cap}",
            hint="take 0, which is 4 x the largest rank",
            context={"field": "basis_cap"},
        )
    _check_selection(shapes, participants, terms)


def check_auto(participants: Sequence[Participant], layout: SlotLayout, block_bytes: int, rates: Rates) -> None:
    """Refuse `auto` budgets whose seconds do not suffice for what is always encrypted.

    Raises:
        InvalidPlan: naming the least seconds that would do.
    """
    blocks = layout.blocks([0] * len(layout.modules))
    for one in participants:
        seconds = _auto_seconds(one.budget)
        # An agent that encrypts columns has found that its seconds suffice, by speeds that only it knows.
        if seconds is None or any(one.columns):
            continue
        least_s = (one.rates or rates).he.seconds(blocks, layout.values_per_block, block_bytes)
        if least_s > seconds:
            raise InvalidPlan(
                f"{one.name}: expected budget auto to allow at least {least_s:.3g} s, which the {layout.dense_slots:,} "
                f"dense values take that are always encrypted, got {one.budget}",
                hint="allow more seconds, or train fewer dense tensors",
                context={"agent": one.name},
            )


def _auto_seconds(text: str) -> float | None:
    """Seconds of a budget `auto`; what an agent calls its budget may be any text."""
    try:
        budget = parse_budget(text)
    except InvalidConfiguration:
        return None
    return budget.amount if budget.kind is BudgetKind.AUTO else None


def check_payloads(agents: Sequence[AgentCost], limit_bytes: int = PAYLOAD_LIMIT_BYTES) -> None:
    """Refuse uploads that the aggregator would refuse.

    Raises:
        PayloadTooLarge: naming the first agent and what it would send.
    """
    for cost in agents:
        for kind, size in (("factors", cost.factors_bytes), ("ciphertext", cost.cipher_up_bytes)):
            if size > limit_bytes:
                raise PayloadTooLarge(
                    f"{cost.agent}: expected {kind} of at most {limit_bytes / 1e6:,.0f} MB, got {size / 1e6:,.0f} MB",
                    hint="lower rank, basis cap or budget, pack densely, or raise the aggregator's max_payload_bytes",
                    context={"agent": cost.agent},
                )


def _check_selection(shapes: ModelShapes, participants: Sequence[Participant], terms: Terms) -> None:
    """Budgets that encrypt a part of a module need an agreed order."""
    widths = [module.in_features for module in shapes.modules]
    selective = next(
        (one for one in participants if any(0 < k < n for k, n in zip(one.columns, widths, strict=False))), None
    )
    if selective is None or terms.negotiation is Negotiation.OPE:
        return
    if terms.negotiation is Negotiation.NONE:
        raise InvalidPlan(
            f"{selective.name}: expected a budget that encrypts every column or none, because nothing is negotiated, "
            f"got {selective.budget}",
            hint="use the budget full, or --negotiation encrypted",
            context={"agent": selective.name},
        )
    check_negotiation(terms.parameters, max(terms.target_agents, len(participants)))
