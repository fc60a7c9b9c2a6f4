"""What the aggregator holds of an agent, made by the product's own code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from services.client_agent.adapter import AdapterState
from services.client_agent.round import factor_tensors, local_update, wire_orders
from shelora.plan import FederationSeed, ModelShapes, Negotiation, Plan, parse_budget, resolve_plan_columns

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

FEDERATION: Final = "audit"
SEED: Final = FederationSeed(bytes(range(32)))
EPOCH: Final = 1
_PLACEHOLDER_DIGEST: Final = bytes(32)


@dataclass(frozen=True, eq=False)
class Sight:
    """One module of one agent in one round, as it arrives.

    Attributes:
        left: float64[m, r], the left factor.
        right: float64[r, n - k], the plain columns of the right factor in wire order.
        width: n.
    """

    left: Float64
    right: Float64
    width: int

    @property
    def hidden(self) -> int:
        """Encrypted columns k."""
        return self.width - self.right.shape[1]

    @property
    def rank(self) -> int:
        """LoRA rank r."""
        return self.left.shape[1]


@dataclass(frozen=True, eq=False)
class Transmission:
    """A factors payload, and beside it the secret orders that only agents know.

    Attributes:
        sights: what the aggregator gets, one a module.
        orders: order[p] is the true column at wire position p.
    """

    sights: tuple[Sight, ...]
    orders: tuple[Int64, ...]


def transmit(
    adapter: AdapterState, scaling: float, shapes: ModelShapes, budget: str, priorities: Sequence[Int64], round: int
) -> Transmission:
    """Send a trained adapter as an agent does: canonical form, wire order, float32, without its encrypted columns.

    Args:
        adapter: what the agent trained.
        scaling: its alpha / rank.
        shapes: what the federation averages.
        budget: the agent's budget, for example "full" or "25%".
        priorities: negotiated column order per module, most sensitive first.
        round: round number; the wire order depends on it.
    """
    columns = resolve_plan_columns(
        parse_budget(budget), shapes.modules, None, [adapter.modules[0].rank] * len(shapes.modules), 0
    )
    plan = Plan(
        federation=FEDERATION,
        version=1,
        epoch=EPOCH,
        shapes=shapes,
        cap=4 * adapter.modules[0].rank,
        negotiation=Negotiation.ENCRYPTED,
        levels=tuple((count,) for count in columns),
        parameters_digest=_PLACEHOLDER_DIGEST,
        values_per_block=4096,
    )
    orders = wire_orders(SEED, plan, round, priorities)
    payload = factor_tensors(local_update(adapter, scaling), orders, columns)
    sights = tuple(
        Sight(
            payload[f"{index}.left"].astype(np.float64), payload[f"{index}.right"].astype(np.float64), shape.in_features
        )
        for index, shape in enumerate(shapes.modules)
    )
    return Transmission(sights, orders)
