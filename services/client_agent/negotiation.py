"""The agent's side of the negotiation: which columns matter most, told without telling (docs/method.md section 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from services.client_agent.keys import EpochKeys
from shelora.errors import MalformedPayload
from shelora.he.residues import as_blocks, check_residues
from shelora.he.secret.order_preserving import OrderPreservingScores
from shelora.plan import (
    FederationSeed,
    ModelShapes,
    Plan,
    column_sensitivity,
    column_tokens,
    order_columns,
    pack_scores,
    priorities_from_scores,
    priority_from_tokens,
    quantise_scores,
)

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]


def sensitivities(activation_norms: Sequence[Float64], a_factors: Sequence[Float64]) -> tuple[Float64, ...]:
    """Column sensitivities per module, float64[n] with mean 1."""
    return tuple(column_sensitivity(norms, a) for norms, a in zip(activation_norms, a_factors, strict=True))


def encrypted_scores(keys: EpochKeys, shapes: ModelShapes, scores: Sequence[Float64]) -> bytes:
    """The `encrypted` payload: packed scores as raw ciphertext blocks."""
    return keys.encryptor.encrypt(pack_scores(shapes, scores)).tobytes()


def priorities_from_sum(keys: EpochKeys, plan: Plan, payload: bytes) -> list[Int64]:
    """Column priorities per module from the aggregator's sum; all agents get the same.

    Raises:
        SizeMismatch, ResidueOutOfRange: not a sum for this plan.
    """
    values = sum(module.in_features for module in plan.shapes.modules)
    blocks = as_blocks(payload, keys.parameters)
    check_residues(blocks, keys.parameters)
    return priorities_from_scores(plan.shapes, keys.decryptor.decrypt(blocks, values))


def vote_tensors(
    seed: FederationSeed, plan: Plan, scores: Sequence[Float64], vote_columns: Sequence[int]
) -> dict[str, Int64]:
    """The `ope` payload: tokens and order-preserving scores of the top columns, in random order of tokens.

    Returns: "<module index>.token" and "<module index>.score", int64[k].
    """
    cipher = OrderPreservingScores(seed.derive("ope", plan.federation, plan.version))
    tensors: dict[str, Int64] = {}
    for index, (module, module_scores, count) in enumerate(zip(plan.shapes.modules, scores, vote_columns, strict=True)):
        tokens = column_tokens(seed, plan.federation, plan.version, module.name, module.in_features)
        # Ascending by token, which is a keyed permutation: the order of the votes tells nothing about the columns.
        top = order_columns(module_scores)[:count]
        top = top[np.argsort(tokens[top])]
        tensors[f"{index}.token"] = np.ascontiguousarray(tokens[top], dtype=np.int64)
        tensors[f"{index}.score"] = cipher.encrypt(quantise_scores(module_scores[top]))
    return tensors


def priorities_from_ranking(seed: FederationSeed, plan: Plan, tensors: Mapping[str, Int64]) -> list[Int64]:
    """Column priorities per module from the aggregator's ranked tokens.

    Raises:
        MalformedPayload: a module is missing.
        ValueOutOfRange: tokens that are not columns of this plan.
    """
    priorities = []
    for index, module in enumerate(plan.shapes.modules):
        ranked = tensors.get(f"{index}.token")
        if ranked is None:
            raise MalformedPayload(f"the ranking lacks module {module.name!r}", hint="compare both software versions")
        tokens = column_tokens(seed, plan.federation, plan.version, module.name, module.in_features)
        priorities.append(priority_from_tokens([int(token) for token in ranked], tokens, module.in_features))
    return priorities


def natural_priorities(shapes: ModelShapes) -> list[Int64]:
    """Priorities where none were negotiated: every level takes all columns or none, so any order serves."""
    return [np.arange(module.in_features, dtype=np.int64) for module in shapes.modules]
