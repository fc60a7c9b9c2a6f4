from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import shelora.plan
from shelora.errors import InvalidPlan, RankMismatch, ShapeMismatch, SizeMismatch
from shelora.plan import (
    DenseShape,
    ModelShapes,
    ModuleShape,
    Negotiation,
    Packing,
    Plan,
    average_bytes,
    cipher_bytes,
    factors_bytes,
    range_bytes,
)

SHAPES = ModelShapes((ModuleShape("a", 6, 10), ModuleShape("b", 20, 4)), (DenseShape("head", (2, 3)),))
PLAN = Plan(
    federation="fed",
    version=1,
    epoch=2,
    shapes=SHAPES,
    cap=8,
    negotiation=Negotiation.ENCRYPTED,
    levels=((2, 10), (1, 4)),
    parameters_digest=bytes(range(32)),
    values_per_block=16,
)
CHANGES: list[dict[str, Any]] = [
    {"federation": "other"},
    {"version": 2},
    {"epoch": 3},
    {"shapes": ModelShapes(SHAPES.modules, ())},
    {"cap": 9},
    {"negotiation": Negotiation.OPE},
    {"levels": ((2, 10), (4,))},
    {"levels": ((2,), (1, 4))},
    {"parameters_digest": bytes(32)},
    {"values_per_block": 32},
    {"packing": Packing.DENSE},
]


def test_digest_tells_every_difference() -> None:
    variants = [PLAN, *(dataclasses.replace(PLAN, **change) for change in CHANGES)]
    assert len({plan.digest() for plan in variants}) == len(variants)
    assert dataclasses.replace(PLAN).digest() == PLAN.digest()
    assert len({*variants, dataclasses.replace(PLAN)}) == len(variants)
    assert {key for change in CHANGES for key in change} == {field.name for field in dataclasses.fields(Plan)}


def test_digest_is_frozen() -> None:
    assert PLAN.digest().hex() == "28f731bb26e93e662db4d1f222d58f1b5c00691693e2eb8c956c853ca5bf69a0"


@pytest.mark.parametrize(
    "change",
    [
        {"federation": ""},
        {"version": -1},
        {"epoch": -1},
        {"cap": 0},
        {"cap": 65_537},
        {"parameters_digest": bytes(31)},
        {"values_per_block": 0},
        {"levels": ((2, 10),)},
        {"levels": ((2, 10), ())},
        {"levels": ((10, 2), (4,))},
        {"levels": ((2, 2), (4,))},
        {"levels": ((2, 11), (4,))},
        {"levels": ((-1, 2), (4,))},
        {"negotiation": Negotiation.NONE},
    ],
)
def test_contradictions_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidPlan):
        dataclasses.replace(PLAN, **change)


def test_without_negotiation_everything_or_nothing_is_encrypted() -> None:
    plan = dataclasses.replace(PLAN, negotiation=Negotiation.NONE, levels=((10,), (0, 4)))
    assert plan.levels == ((10,), (0, 4))


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_layout_has_the_rows_of_the_cohort(ranks: list[int]) -> None:
    layout = PLAN.layout(ranks)
    assert layout.basis_rows == (min(sum(ranks), 6), min(sum(ranks), 8))
    assert (layout.dense, layout.modules, layout.values_per_block) == (SHAPES.dense, SHAPES.modules, 16)
    assert layout.digest() == PLAN.layout(ranks[::-1]).digest()
    dense = dataclasses.replace(PLAN, packing=Packing.DENSE).layout(ranks)
    assert dense == dataclasses.replace(layout, packing=Packing.DENSE)
    assert dense.digest() != layout.digest()


@pytest.mark.parametrize("ranks", [[], [4, 0], [7]])
def test_impossible_ranks_are_refused(ranks: list[int]) -> None:
    with pytest.raises(RankMismatch):
        PLAN.layout(ranks)


def test_cipher_sizes() -> None:
    """Ranks 2 and 3: 5 rows; 6 dense values and 14 columns of 5 slots are 76 values, 5 blocks of 16."""
    assert PLAN.cipher_blocks([2, 3], (10, 4)) == 5
    assert cipher_bytes(PLAN.layout([2, 3]), (10, 4)) == 5 * 256
    assert PLAN.cipher_blocks([2, 3], (0, 0)) == 1
    dense = dataclasses.replace(PLAN, packing=Packing.DENSE)
    assert dense.cipher_blocks([2, 3], (10, 4)) == 3  # 6 dense values and 35 pairs
    assert dense.max_cipher_bytes == cipher_bytes(dense.layout([4, 4]), (10, 4)) == 4 * 256


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(0, 10), st.integers(0, 4))
def test_no_upload_exceeds_the_maximum(ranks: list[int], first: int, second: int) -> None:
    assert cipher_bytes(PLAN.layout(ranks), (first, second)) <= PLAN.max_cipher_bytes


def test_maximum_is_reached() -> None:
    assert PLAN.max_cipher_bytes == cipher_bytes(PLAN.layout([4, 4]), (10, 4))
    smaller = dataclasses.replace(PLAN, levels=((2,), (1,)))
    assert smaller.max_cipher_bytes == cipher_bytes(smaller.layout([4, 4]), (2, 1))


def test_plain_sizes_are_those_of_the_arrays() -> None:
    factors = [
        array
        for module, k in zip(SHAPES.modules, (2, 1), strict=True)
        for array in (
            np.zeros((module.out_features, 3), np.float32),
            np.zeros((3, module.in_features - k), np.float32),
        )
    ]
    assert factors_bytes(SHAPES, 3, (2, 1)) == sum(array.nbytes for array in factors)
    published = [
        array
        for module, s, k in zip(SHAPES.modules, (5, 8), (2, 1), strict=True)
        for array in (np.zeros((module.out_features, s), np.float32), np.zeros((s, module.in_features - k), np.float32))
    ]
    assert average_bytes(SHAPES, (5, 8), (2, 1)) == sum(array.nbytes for array in published)
    assert range_bytes(Packing.EXACT, (5, 8)) == 0
    assert range_bytes(Packing.DENSE, (5, 8)) == np.zeros(13, np.float32).nbytes


def test_figures_of_the_published_workload() -> None:
    """104 modules of 3200 x 3200, rank 4: 10.65 MB of LoRA values; four agents at full budget send 85 or 43 MB each."""
    shapes = ModelShapes(tuple(ModuleShape(f"layer.{index}", 3200, 3200) for index in range(104)), ())
    full = (3200,) * 104
    assert factors_bytes(shapes, 4, (0,) * 104) == 10_649_600
    assert factors_bytes(shapes, 4, full) == 10_649_600 // 2
    plan = dataclasses.replace(
        PLAN, shapes=shapes, cap=16, negotiation=Negotiation.NONE, levels=((3200,),) * 104, values_per_block=4096
    )
    assert plan.max_cipher_bytes == 85_196_800
    assert plan.cipher_blocks([4] * 4, full) == 1300
    dense = dataclasses.replace(plan, packing=Packing.DENSE)
    assert dense.cipher_blocks([4] * 4, full) == 650
    assert cipher_bytes(dense.layout([4] * 4), full) == dense.max_cipher_bytes == 42_598_400
    assert dense.max_cipher_bytes <= 45e6


def test_byte_formulas_refuse_other_modules() -> None:
    with pytest.raises(SizeMismatch):
        factors_bytes(SHAPES, 3, (2,))
    with pytest.raises(ShapeMismatch):
        factors_bytes(SHAPES, 3, (2, 5))
    with pytest.raises(SizeMismatch):
        average_bytes(SHAPES, (2,), (2, 1))


def test_package_exports_are_sorted_and_exist() -> None:
    names = shelora.plan.__all__
    assert set(names) <= set(dir(shelora.plan))
    assert len(set(names)) == len(names)
    assert all((getattr(shelora.plan, name).__doc__ or "") for name in names)
