"""A plan explained before it runs, and while it does: everything in one value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.operators.leakage import Level, Verdict
from services.operators.planning.aggregator import AggregatorCost, aggregator_cost
from services.operators.planning.costs import AgentCost, agent_cost, published_by
from services.operators.planning.limits import check_auto, check_participants, check_payloads, check_terms
from services.operators.planning.precision import Basis, Precision, basis_of, precision_of
from services.operators.planning.rates import Rates
from services.operators.planning.security import Security, security_of
from services.operators.planning.terms import Participant, Terms
from services.operators.planning.verdict import unsafe_among, verdicts_of
from shelora.lora.basis import basis_rows
from shelora.plan import ModelShapes, Packing, SlotLayout


@dataclass(frozen=True)
class Explanation:
    """What a plan costs, how exact it is, and what it gives away; a value that JSON can hold.

    Attributes:
        modules, dense_values: what is trained.
        packing: how ciphertexts are packed.
        cap: largest number of basis rows.
        basis: the common basis, and what the cap costs.
        precision: errors of one round.
        security: of the ciphertexts.
        agents: one cost an agent.
        aggregator: what a round costs the aggregator.
        verdicts: what each agent's settings give away.
        level: that of the worst verdict.
        unsafe: names of the agents whose settings are unsafe.
        rates: speeds that the seconds rest on where an agent did not measure its own.
    """

    modules: int
    dense_values: int
    packing: Packing
    cap: int
    basis: Basis
    precision: Precision
    security: Security
    agents: tuple[AgentCost, ...]
    aggregator: AggregatorCost
    verdicts: tuple[Verdict, ...]
    level: Level
    unsafe: tuple[str, ...]
    rates: Rates

    @property
    def summary(self) -> str:
        """The plan in one line."""
        up, down = ([size(cost) / 1e6 for cost in self.agents] for size in (_up, _down))
        he = [cost.encrypt_s + cost.decrypt_s for cost in self.agents]
        ram = [cost.peak_ram_bytes / 1e6 for cost in self.agents] + [self.aggregator.peak_ram_bytes / 1e6]
        safety = f"{self.level.value} for {', '.join(self.unsafe[:6])}" if self.unsafe else self.level.value
        return (
            f"{len(self.agents)} agents, per round and agent {_span(up, 1)} MB up, {_span(down, 1)} MB down, "
            f"HE {_span(he, 2)} s, at most {max(ram):.0f} MB of memory; {self.basis.verdict}; "
            f"{self.security.bits}-bit security; leakage: {safety}"
        )


def explain(
    shapes: ModelShapes,
    participants: Sequence[Participant],
    terms: Terms | None = None,
    *,
    rates: Rates | None = None,
    aggregator_rates: Rates | None = None,
) -> Explanation:
    """Explain a round in which all participants are counted.

    Args:
        shapes: what is trained.
        participants: the cohort.
        terms: what the federation decides for all.
        rates: speeds of agents that have none of their own.
        aggregator_rates: speeds of the aggregator's machine; None takes `rates`.

    Raises:
        InvalidConfiguration, InvalidPlan, RankMismatch, ValueOutOfRange, PayloadTooLarge: settings that cannot work.
        SizeMismatch, ShapeMismatch: columns that do not fit the shapes.
        StoredBytesCorrupt: the published leakage figures cannot be read.

    Unsafe settings are explained like others; `require_safe` refuses them.

    Source: docs/method.md sections 7 and 8.
    """
    terms, rates, cohort = terms or Terms(), rates or Rates(), tuple(participants)
    check_participants(shapes, cohort, terms)
    check_terms(terms, max(len(cohort), terms.target_agents))
    ranks = [participant.rank for participant in cohort]
    cap = terms.cap_for(ranks)
    layout = cohort_layout(shapes, cohort, terms)
    rows = layout.basis_rows
    check_auto(cohort, layout, terms.parameters.block_bytes, rates)
    published = published_by(shapes, layout, cohort)
    agents = tuple(agent_cost(shapes, layout, one, published, one.rates or rates) for one in cohort)
    check_payloads(agents, terms.payload_limit_bytes)
    verdicts = verdicts_of(shapes, cohort, terms)
    order = list(Level)
    return Explanation(
        modules=len(shapes.modules),
        dense_values=layout.dense_slots,
        packing=terms.packing,
        cap=cap,
        basis=basis_of(shapes, ranks, rows, cap),
        precision=precision_of(shapes, rows, terms.packing, terms.parameters, len(cohort)),
        security=security_of(terms.parameters),
        agents=agents,
        aggregator=aggregator_cost(shapes, layout, cohort, agents, published, cap, aggregator_rates or rates),
        verdicts=verdicts,
        level=max((verdict.level for verdict in verdicts), key=order.index),
        unsafe=unsafe_among(verdicts),
        rates=rates,
    )


def cohort_layout(shapes: ModelShapes, participants: Sequence[Participant], terms: Terms) -> SlotLayout:
    """The slots of a round in which all participants are in the cohort.

    Raises:
        RankMismatch: no participants, or a rank larger than a module.
    """
    ranks = [participant.rank for participant in participants]
    rows = tuple(basis_rows(module.out_features, ranks, terms.cap_for(ranks)) for module in shapes.modules)
    return SlotLayout(shapes.dense, shapes.modules, rows, terms.parameters.values_per_block, terms.packing)


def _up(cost: AgentCost) -> int:
    return cost.up_bytes


def _down(cost: AgentCost) -> int:
    return cost.down_bytes


def _span(values: Sequence[float], digits: int) -> str:
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} to {high}"
