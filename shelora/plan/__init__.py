"""What a federation agrees on: sensitivity order, budgets, negotiation, wire order, slot layout. numpy only."""

from shelora.plan.budgets import (
    DEFAULT_AUTO_SECONDS,
    Budget,
    BudgetKind,
    HeRate,
    parse_budget,
    resolve_columns,
    resolve_plan_columns,
)
from shelora.plan.layout import SlotLayout
from shelora.plan.negotiation import (
    MAX_SCORE,
    pack_scores,
    priorities_digest,
    priorities_from_scores,
    unpack_scores,
)
from shelora.plan.packing import (
    MAX_DENSE_AGENTS,
    Packing,
    agree_ranges,
    check_packing,
    dense_error,
    dequantise,
    quantise,
)
from shelora.plan.plan import Negotiation, Plan, average_bytes, cipher_bytes, factors_bytes, range_bytes
from shelora.plan.ranking import ColumnVote, column_tokens, priority_from_tokens, quantise_scores, rank_tokens
from shelora.plan.seed import FederationSeed, fresh_rows, hkdf_sha256, keyed_permutation, uniform_stream
from shelora.plan.sensitivity import column_sensitivity, order_columns
from shelora.plan.shapes import DenseShape, ModelShapes, ModuleShape
from shelora.plan.wire_order import apply, invert, undo, wire_order

__all__ = [
    "DEFAULT_AUTO_SECONDS",
    "MAX_DENSE_AGENTS",
    "MAX_SCORE",
    "Budget",
    "BudgetKind",
    "ColumnVote",
    "DenseShape",
    "FederationSeed",
    "HeRate",
    "ModelShapes",
    "ModuleShape",
    "Negotiation",
    "Packing",
    "Plan",
    "SlotLayout",
    "agree_ranges",
    "apply",
    "average_bytes",
    "check_packing",
    "cipher_bytes",
    "column_sensitivity",
    "column_tokens",
    "dense_error",
    "dequantise",
    "factors_bytes",
    "fresh_rows",
    "hkdf_sha256",
    "invert",
    "keyed_permutation",
    "order_columns",
    "pack_scores",
    "parse_budget",
    "priorities_digest",
    "priorities_from_scores",
    "priority_from_tokens",
    "quantise",
    "quantise_scores",
    "range_bytes",
    "rank_tokens",
    "resolve_columns",
    "resolve_plan_columns",
    "undo",
    "uniform_stream",
    "unpack_scores",
    "wire_order",
]
