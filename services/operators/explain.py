"""What a plan costs each agent, by the formulas of docs/method.md section 7, before or while it runs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from shelora.errors import InvalidConfiguration
from shelora.lora.basis import basis_rows
from shelora.plan import (
    BudgetKind,
    DenseShape,
    HeRate,
    ModelShapes,
    ModuleShape,
    Packing,
    SlotLayout,
    average_bytes,
    cipher_bytes,
    factors_bytes,
    parse_budget,
    range_bytes,
    resolve_plan_columns,
)

FLOAT_BYTES: Final = 4
"""Bytes of a plain value on the wire."""

VALUES_PER_BLOCK: Final = 4096
"""Real values in a ciphertext block of the usual parameter set."""

ENCRYPT_VALUES_PER_S: Final = 5e6
"""What one core of a usual machine encrypts; used where nothing was measured."""

UPLOAD_BYTES_PER_S: Final = 1.25e6
"""10 Mbit/s; used where nothing was measured."""

CAP_FACTOR: Final = 4
"""A basis cap left open is this many times the largest rank."""

_ITEM: Final = re.compile(r"(?:(dense|\d{1,6})\*)?(\d{1,9})(?:x(\d{1,9}))?", re.ASCII)
_FORMS: Final = (
    'name a JSON file {"modules": [{"name", "out_features", "in_features"}], "dense": [{"name", "shape"}]}, or write '
    "COUNT*OUTxIN,...,dense*VALUES, for example 12*384x384,dense*2310"
)


@dataclass(frozen=True)
class Participant:
    """One agent of a plan; `columns` is its encrypted k per module."""

    name: str
    rank: int
    budget: str
    columns: tuple[int, ...]


@dataclass(frozen=True)
class AgentCost:
    """What one agent sends and receives in one round. Bytes are raw tensor and ciphertext bytes without framing.

    Attributes:
        encrypted_share: encrypted columns over all columns.
        blocks: ciphertext blocks sent.
        factors_bytes, cipher_up_bytes: up.
        projection_bytes, average_bytes, cipher_down_bytes: down.
        encrypt_s, upload_s: predicted from the rates that were given.
    """

    agent: str
    rank: int
    budget: str
    columns: tuple[int, ...]
    encrypted_share: float
    blocks: int
    factors_bytes: int
    cipher_up_bytes: int
    projection_bytes: int
    average_bytes: int
    cipher_down_bytes: int
    encrypt_s: float
    upload_s: float

    @property
    def up_bytes(self) -> int:
        """Everything the agent sends in a round."""
        return self.factors_bytes + self.cipher_up_bytes

    @property
    def down_bytes(self) -> int:
        """Everything the agent receives in a round."""
        return self.projection_bytes + self.average_bytes + self.cipher_down_bytes


@dataclass(frozen=True)
class Explanation:
    """A plan's costs.

    Attributes:
        modules, dense_values: what is trained.
        packing: how ciphertexts are packed.
        cap: largest number of basis rows.
        basis_rows: s per module for this cohort.
        exact: whether the basis holds every update (sum of ranks within the cap).
        agents: one cost an agent.
    """

    modules: int
    dense_values: int
    packing: Packing
    cap: int
    basis_rows: tuple[int, ...]
    exact: bool
    agents: tuple[AgentCost, ...]


def explain(
    shapes: ModelShapes,
    participants: Sequence[Participant],
    *,
    cap: int = 0,
    values_per_block: int = VALUES_PER_BLOCK,
    rate: HeRate | None = None,
    packing: Packing = Packing.EXACT,
) -> Explanation:
    """Costs of a round in which all participants are counted.

    Args:
        shapes: what is trained.
        participants: the cohort.
        cap: largest number of basis rows per module; 0 means 4 x the largest rank.
        values_per_block: real values in a ciphertext block.
        rate: encrypt and upload rate for the predicted seconds.
        packing: how ciphertexts are packed.

    Raises:
        InvalidConfiguration: no participants.
        RankMismatch, SizeMismatch, ShapeMismatch: ranks or columns that do not fit the shapes.

    Source: docs/method.md section 7.
    """
    if not participants:
        raise InvalidConfiguration("plan explain: expected at least one agent, got none", hint="give --ranks 4,8,16")
    ranks = [participant.rank for participant in participants]
    limit = cap or CAP_FACTOR * max(ranks)
    rows = tuple(basis_rows(module.out_features, ranks, limit) for module in shapes.modules)
    layout = SlotLayout(shapes.dense, shapes.modules, rows, values_per_block, packing)
    widths = [module.in_features for module in shapes.modules]
    smallest = [min(participant.columns[index] for participant in participants) for index in range(len(rows))]
    largest = [max(participant.columns[index] for participant in participants) for index in range(len(rows))]
    ranges = range_bytes(packing, rows)
    average = average_bytes(shapes, rows, smallest) + ranges
    used_rate = rate or HeRate(ENCRYPT_VALUES_PER_S, UPLOAD_BYTES_PER_S)
    costs = []
    for participant in participants:
        factors = factors_bytes(shapes, participant.rank, participant.columns)
        blocks = layout.blocks(participant.columns)
        cipher = cipher_bytes(layout, participant.columns)
        costs.append(
            AgentCost(
                agent=participant.name,
                rank=participant.rank,
                budget=participant.budget,
                columns=participant.columns,
                encrypted_share=sum(participant.columns) / sum(widths) if widths else 0.0,
                blocks=blocks,
                factors_bytes=factors,
                cipher_up_bytes=cipher,
                projection_bytes=FLOAT_BYTES * participant.rank * sum(rows) + ranges,
                average_bytes=average,
                cipher_down_bytes=cipher_bytes(layout, largest),
                encrypt_s=blocks * values_per_block / used_rate.encrypt_values_per_s,
                upload_s=(factors + cipher) / used_rate.upload_bytes_per_s,
            )
        )
    exact = all(s == min(sum(ranks), module.out_features) for module, s in zip(shapes.modules, rows, strict=True))
    return Explanation(
        modules=len(shapes.modules),
        dense_values=layout.dense_slots,
        packing=packing,
        cap=limit,
        basis_rows=rows,
        exact=exact,
        agents=tuple(costs),
    )


def hypothetical(
    shapes: ModelShapes,
    ranks: Sequence[int],
    budgets: Sequence[str],
    *,
    cap: int = 0,
    rate: HeRate | None = None,
    packing: Packing = Packing.EXACT,
) -> list[Participant]:
    """Agents that do not exist yet; budgets are repeated over the ranks.

    `auto` is resolved as an agent does it: the basis is taken to reach its cap.

    Raises:
        InvalidConfiguration: a budget that cannot be read, or no budgets.
        RankMismatch: an impossible rank.
    """
    if not budgets:
        raise InvalidConfiguration("plan explain: expected at least one budget, got none", hint="give --budgets full")
    used_rate = rate or HeRate(ENCRYPT_VALUES_PER_S, UPLOAD_BYTES_PER_S)
    dense_values = sum(tensor.size for tensor in shapes.dense)
    found = []
    for index, rank in enumerate(ranks):
        budget = parse_budget(budgets[index % len(budgets)])
        rows = tuple(min(module.out_features, cap or CAP_FACTOR * rank) for module in shapes.modules)
        columns = resolve_plan_columns(
            budget,
            shapes.modules,
            used_rate if budget.kind is BudgetKind.AUTO else None,
            rows,
            dense_values,
            packing=packing,
        )
        found.append(Participant(f"agent-{index + 1}", rank, str(budget), columns))
    return found


def parse_shapes(text: str) -> ModelShapes:
    """Model shapes from a JSON file or from a short form such as 104*3200x3200,dense*2048.

    Raises:
        InvalidConfiguration: neither.
        InvalidPlan: impossible shapes.
    """
    path = Path(text).expanduser()
    if path.suffix == ".json" or path.is_file():
        return _shapes_from_file(path)
    modules: list[ModuleShape] = []
    dense: list[DenseShape] = []
    for item in text.split(","):
        match = _ITEM.fullmatch(item.strip())
        kind = match[1] if match else None
        if match is None or (kind == "dense") == bool(match[3]):
            raise InvalidConfiguration(f"model shapes: expected a file or a short form, got {item[:60]!r}", hint=_FORMS)
        if kind == "dense":
            dense.append(DenseShape(f"dense-{len(dense) + 1}", (int(match[2]),)))
            continue
        for _ in range(int(kind or 1)):
            modules.append(ModuleShape(f"module-{len(modules) + 1}", int(match[2]), int(match[3])))
    return ModelShapes(tuple(modules), tuple(dense))


def parse_ranks(text: str) -> list[int]:
    """Ranks from a text such as 4,8,16.

    Raises:
        InvalidConfiguration: not positive whole numbers.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and 0 < int(part) <= 1024 for part in parts):
        raise InvalidConfiguration(
            f"ranks: expected whole numbers of 1 to 1,024 with commas between, got {text[:60]!r}",
            hint="write for example 4,8,16,32",
        )
    return [int(part) for part in parts]


def parse_budgets(text: str) -> list[str]:
    """Budgets from a text such as full,25%,5%,auto.

    Raises:
        InvalidConfiguration: one of them cannot be read.
    """
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        parse_budget(part)
    return parts


def _shapes_from_file(path: Path) -> ModelShapes:
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
        modules = tuple(
            ModuleShape(str(module["name"]), _size(module["out_features"]), _size(module["in_features"]))
            for module in found["modules"]
        )
        dense = tuple(
            DenseShape(str(tensor["name"]), tuple(_size(axis) for axis in tensor["shape"]))
            for tensor in found.get("dense", ())
        )
    except OSError as error:
        raise InvalidConfiguration(
            f"model shapes: expected a readable file, got {path} ({error.strerror or type(error).__name__})",
            hint=_FORMS,
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidConfiguration(
            f"model shapes: expected lists of modules and dense tensors in {path}, got {type(error).__name__}: {error}",
            hint=_FORMS,
        ) from error
    return ModelShapes(modules, dense)


def _size(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value != int(value):
        raise TypeError(f"a size that is a whole number, not {value!r}")
    return int(value)
