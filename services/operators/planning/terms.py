"""What a plan is about: who takes part, on which terms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from services.operators.leakage import DEFAULT_BATCH, DEFAULT_EXAMPLES, DEFAULT_STEPS
from services.operators.planning.rates import Rates
from services.operators.planning.security import USUAL_PARAMETERS
from shelora.errors import InvalidConfiguration
from shelora.he.parameters import CkksParameters
from shelora.plan import BudgetKind, ModelShapes, Negotiation, Packing, parse_budget, resolve_plan_columns

CAP_FACTOR: Final = 4
"""A basis cap left open is this many times the largest rank."""

PAYLOAD_LIMIT_BYTES: Final = 16 << 30
"""Longest upload that an aggregator takes unless its configuration says otherwise."""


@dataclass(frozen=True)
class Participant:
    """One agent of a plan.

    Attributes:
        name: of the agent.
        rank: LoRA rank.
        budget: as it was written.
        columns: encrypted k per module.
        examples: local texts.
        rates: its own speeds; None takes the common ones.
    """

    name: str
    rank: int
    budget: str
    columns: tuple[int, ...]
    examples: int = DEFAULT_EXAMPLES
    rates: Rates | None = None


@dataclass(frozen=True)
class Terms:
    """What a federation decides for all.

    Attributes:
        cap: largest number of basis rows per module; 0 means 4 x the largest rank.
        packing: how ciphertexts are packed.
        parameters: HE parameters.
        negotiation: how the encrypted columns are agreed; None leaves it to the aggregator.
        target_agents: agents that make a cohort; 0 for those at hand.
        payload_limit_bytes: longest upload that the aggregator takes.
        batch_size, steps: texts a step and steps a round, for the verdict; agents decide, nobody else knows.
    """

    cap: int = 0
    packing: Packing = Packing.EXACT
    parameters: CkksParameters = USUAL_PARAMETERS
    negotiation: Negotiation | None = None
    target_agents: int = 0
    payload_limit_bytes: int = PAYLOAD_LIMIT_BYTES
    batch_size: int = DEFAULT_BATCH
    steps: int = DEFAULT_STEPS

    def cap_for(self, ranks: Sequence[int]) -> int:
        """The cap in force for these ranks."""
        return self.cap or CAP_FACTOR * max(ranks)


def imagine(
    shapes: ModelShapes,
    ranks: Sequence[int],
    budgets: Sequence[str],
    terms: Terms | None = None,
    *,
    rates: Rates | None = None,
    examples: int = DEFAULT_EXAMPLES,
) -> list[Participant]:
    """Agents that do not exist yet; budgets are repeated over the ranks.

    `auto` is resolved as an agent does it: the basis is taken to reach its cap.

    Raises:
        InvalidConfiguration: a budget that cannot be read, or no budgets.
        RankMismatch: an impossible rank.
    """
    if not budgets:
        raise InvalidConfiguration("plan explain: expected at least one budget, got none", hint="give --budgets full")
    terms, rates = terms or Terms(), rates or Rates()
    dense_values = sum(tensor.size for tensor in shapes.dense)
    found = []
    for index, rank in enumerate(ranks):
        budget = parse_budget(budgets[index % len(budgets)])
        rows = tuple(min(module.out_features, terms.cap or CAP_FACTOR * rank) for module in shapes.modules)
        columns = resolve_plan_columns(
            budget,
            shapes.modules,
            rates.he if budget.kind is BudgetKind.AUTO else None,
            rows,
            dense_values,
            values_per_block=terms.parameters.values_per_block,
            block_bytes=terms.parameters.block_bytes,
            packing=terms.packing,
        )
        found.append(Participant(f"agent-{index + 1}", rank, str(budget), columns, examples))
    return found
