"""Which tensors the payloads and results of a round hold."""

from __future__ import annotations

from collections.abc import Sequence

from services.aggregator.tensors import FLOAT32, INT64, TensorSpec
from shelora.lora import basis_rows
from shelora.plan import Packing, Plan


def factors_specs(plan: Plan, rank: int, columns: Sequence[int]) -> list[TensorSpec]:
    """Tensors of a factors payload, left and right of every module in plan order.

    Args:
        plan: the plan in force.
        rank: LoRA rank of the sender.
        columns: its encrypted columns k per module.
    """
    specs: list[TensorSpec] = []
    for index, (module, hidden) in enumerate(zip(plan.shapes.modules, columns, strict=True)):
        left, right = (module.out_features, rank), (rank, module.in_features - hidden)
        specs.append(TensorSpec(f"{index}.left", FLOAT32, left, module.name, rank_axis=1))
        specs.append(TensorSpec(f"{index}.right", FLOAT32, right, module.name, rank_axis=0))
    return specs


def votes_specs(plan: Plan, columns: Sequence[int]) -> list[TensorSpec]:
    """Tensors of a votes payload, token and score of every module in plan order; `columns` votes per module."""
    specs: list[TensorSpec] = []
    for index, (module, count) in enumerate(zip(plan.shapes.modules, columns, strict=True)):
        specs.append(TensorSpec(f"{index}.token", INT64, (count,), module.name))
        specs.append(TensorSpec(f"{index}.score", INT64, (count,), module.name))
    return specs


def basis_specs(plan: Plan, ranks: Sequence[int]) -> list[TensorSpec]:
    """Tensors of the basis of a cohort with these ranks."""
    return rows_specs(plan, [basis_rows(module.out_features, ranks, plan.cap) for module in plan.shapes.modules])


def rows_specs(plan: Plan, rows: Sequence[int]) -> list[TensorSpec]:
    """Tensors of a basis with `rows` directions per module."""
    return [
        TensorSpec(f"{index}.basis", FLOAT32, (module.out_features, count), module.name)
        for index, (module, count) in enumerate(zip(plan.shapes.modules, rows, strict=True))
    ]


def projection_specs(plan: Plan, rank: int, rows: Sequence[int]) -> list[TensorSpec]:
    """Tensors of one member's projections onto a basis with `rows` directions per module, without its ranges."""
    return [
        TensorSpec(f"{index}.projection", FLOAT32, (count, rank), module.name)
        for index, (module, count) in enumerate(zip(plan.shapes.modules, rows, strict=True))
    ]


def range_specs(plan: Plan, rows: Sequence[int]) -> list[TensorSpec]:
    """Ranges of all modules with dense packing, else none; behind the other tensors of a file."""
    return [
        TensorSpec(f"{index}.range", FLOAT32, (count,), module.name)
        for index, (module, count) in enumerate(zip(plan.shapes.modules, rows, strict=True))
        if plan.packing is Packing.DENSE
    ]


def average_specs(plan: Plan, rows: Sequence[int], columns: Sequence[Sequence[int]]) -> list[TensorSpec]:
    """Basis and plain columns of every module; the plain columns begin at the smallest k of the members."""
    specs: list[TensorSpec] = []
    for index, (module, count) in enumerate(zip(plan.shapes.modules, rows, strict=True)):
        first = min(member_columns[index] for member_columns in columns)
        specs.append(TensorSpec(f"{index}.basis", FLOAT32, (module.out_features, count), module.name))
        specs.append(TensorSpec(f"{index}.plain", FLOAT32, (count, module.in_features - first), module.name))
    return specs
