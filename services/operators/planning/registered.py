"""The plan of a federation and its registered agents, and what is checked before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from services.operators.domain import Federation, FederationSpec, RegisteredAgent, Round
from services.operators.planning.explanation import Explanation, explain
from services.operators.planning.limits import check_terms
from services.operators.planning.rates import Rates, measured_rates
from services.operators.planning.terms import Participant, Terms
from services.operators.planning.verdict import require_safe, unsafe_among, verdicts_of
from shelora.errors import InvalidPlan
from shelora.plan import ModelShapes


@dataclass(frozen=True)
class Preflight:
    """What is known before a federation starts.

    Attributes:
        registered, target: agents that have registered, and that make a cohort.
        explanation: of the registered agents' plan, None while there is none.
    """

    registered: int
    target: int
    explanation: Explanation | None

    @property
    def summary(self) -> str:
        """One line."""
        if self.explanation is None:
            return (
                f"plan: no agent of {self.target} has registered, so nothing is known of ranks and budgets; "
                "run shelora plan explain once they have"
            )
        missing = self.target - self.registered
        later = f"; {missing} more agents are not part of this" if missing > 0 else ""
        return f"plan: {self.explanation.summary}{later}"


def terms_of(spec: FederationSpec) -> Terms:
    """What a specification decides for all."""
    return Terms(
        cap=spec.basis_cap,
        packing=spec.packing,
        parameters=spec.parameters,
        negotiation=spec.negotiation,
        target_agents=spec.target_agents,
    )


def present_terms(federation: Federation) -> Terms:
    """The terms of the plan in force, else those of the specification."""
    terms = terms_of(federation.spec)
    return terms if federation.plan is None else replace(terms, cap=federation.plan.cap)


def shapes_of(federation: Federation) -> ModelShapes:
    """What a federation trains.

    Raises:
        InvalidPlan: no agent has registered yet.
    """
    shapes = federation.plan.shapes if federation.plan else federation.shapes
    if shapes is None:
        raise InvalidPlan(
            f"federation {federation.spec.federation}: expected a plan or a registered agent, got neither",
            hint="wait for an agent, or name --model-shapes",
        )
    return shapes


def explain_registered(
    federation: Federation,
    agents: Sequence[RegisteredAgent],
    rounds: Sequence[Round] = (),
    terms: Terms | None = None,
    *,
    rates: Rates | None = None,
) -> Explanation:
    """Explain the plan in force, or the one that the registered agents will get.

    Args:
        federation: as the aggregator has it.
        agents: those registered.
        rounds: rounds so far; agents' own figures in them replace the common rates.
        terms: what to plan with; None takes the terms in force.
        rates: speeds where none were measured.

    Raises:
        InvalidPlan: no agent has registered; or as `explain`.
    """
    shapes = shapes_of(federation)
    chosen = terms or present_terms(federation)
    common = rates or Rates()
    measured = measured_rates(rounds, federation.spec.parameters, common)
    participants = [replace(_participant(agent), rates=measured.get(agent.name)) for agent in agents]
    return explain(shapes, participants, chosen, rates=common)


def unsafe_registered(federation: Federation, agents: Sequence[RegisteredAgent]) -> tuple[str, ...]:
    """Names of the registered agents whose settings are unsafe, whenever they came."""
    if not agents:
        return ()
    participants = [_participant(agent) for agent in agents]
    return unsafe_among(verdicts_of(shapes_of(federation), participants, present_terms(federation)))


def _participant(agent: RegisteredAgent) -> Participant:
    return Participant(agent.name, agent.rank, agent.budget, agent.columns, max(agent.examples, 1))


def preflight(federation: Federation, agents: Sequence[RegisteredAgent], *, allow_unsafe: bool) -> Preflight:
    """Check all that is known before a federation starts.

    Raises:
        InvalidPlan and others that `explain` names: it cannot work.
        UnsafePlan: it gives away what it should protect, and that is not allowed.
    """
    target = federation.spec.target_agents
    check_terms(terms_of(federation.spec), target)
    if not agents:
        return Preflight(0, target, None)
    found = explain_registered(federation, agents)
    if not allow_unsafe:
        require_safe(found.verdicts)
    return Preflight(len(agents), target, found)
