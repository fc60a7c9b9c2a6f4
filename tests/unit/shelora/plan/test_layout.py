from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shelora.errors import InvalidPlan, ShapeMismatch, SizeMismatch
from shelora.plan import Budget, DenseShape, ModuleShape, Packing, SlotLayout, resolve_columns


@st.composite
def layouts(draw: st.DrawFn) -> SlotLayout:
    widths = draw(st.lists(st.integers(1, 12), min_size=0, max_size=4))
    rows = [draw(st.integers(1, 4)) for _ in widths]
    axes = draw(st.lists(st.lists(st.integers(1, 3), max_size=3).map(tuple), max_size=3))
    return SlotLayout(
        tuple(DenseShape(f"dense.{index}", shape) for index, shape in enumerate(axes)),
        tuple(ModuleShape(f"module.{index}", 4, n) for index, n in enumerate(widths)),
        tuple(rows),
        draw(st.integers(1, 9)),
        draw(st.sampled_from(Packing)),
    )


def draw_columns(data: st.DataObject, layout: SlotLayout) -> list[int]:
    return [data.draw(st.integers(0, module.in_features)) for module in layout.modules]


def make_parts(layout: SlotLayout, columns: list[int]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Distinct non-zero numbers everywhere."""
    numbers = iter(np.arange(1.0, layout.total_slots + 1))
    dense = [np.array([next(numbers) for _ in range(tensor.size)]).reshape(tensor.shape) for tensor in layout.dense]
    parts = [
        np.array([next(numbers) for _ in range(rows * k)]).reshape(rows, k)
        for rows, k in zip(layout.basis_rows, columns, strict=True)
    ]
    return dense, parts


def naive_slots(layout: SlotLayout) -> list[tuple[str, int, int, int]]:
    """What sits in every slot, built from the definition with exact fractions."""
    slots = [("dense", index, item, 0) for index, tensor in enumerate(layout.dense) for item in range(tensor.size)]
    keys = [
        (Fraction(2 * position + 1, 2 * module.in_features), index, position)
        for index, module in enumerate(layout.modules)
        for position in range(module.in_features)
    ]
    for _, index, position in sorted(keys):
        slots += [("column", index, position, row) for row in range(layout.basis_rows[index])]
    return slots


@given(layouts())
def test_slots_follow_the_definition(layout: SlotLayout) -> None:
    slots = naive_slots(layout)
    assert layout.total_slots == len(slots)
    for index in range(len(layout.dense)):
        assert slots[layout.dense_offset(index)] == ("dense", index, 0, 0)
    for index, module in enumerate(layout.modules):
        offsets = layout.offsets(index)
        assert offsets.dtype == np.int64
        assert [slots[offset] for offset in offsets] == [("column", index, p, 0) for p in range(module.in_features)]


@given(layouts(), st.data())
def test_pack_puts_every_value_into_its_slot(layout: SlotLayout, data: st.DataObject) -> None:
    columns = draw_columns(data, layout)
    dense, parts = make_parts(layout, columns)
    packed = layout.pack(dense, parts)
    expected = []
    for kind, index, item, row in naive_slots(layout):
        if kind == "dense":
            expected.append(dense[index].ravel()[item])
        else:
            expected.append(parts[index][row, item] if item < columns[index] else 0.0)
    used = max((slot + 1 for slot, value in enumerate(expected) if value), default=0)
    assert layout.used_slots(columns) == used
    pairs = layout.packing is Packing.DENSE
    reals = layout.dense_slots + math.ceil((used - layout.dense_slots) / 2) if pairs else used
    assert layout.reals(used) == layout.to_reals(packed).size == reals
    assert layout.blocks(columns) == math.ceil(reals / layout.values_per_block)
    assert packed.dtype == np.float64
    assert packed.tolist() == expected[:used]


@given(layouts(), st.data())
def test_unpack_takes_apart_what_pack_made(layout: SlotLayout, data: st.DataObject) -> None:
    columns = draw_columns(data, layout)
    dense, parts = make_parts(layout, columns)
    packed = layout.pack(dense, parts)
    opened = layout.from_reals(layout.to_reals(packed))
    assert opened.size - packed.size in ((0, 1) if layout.packing is Packing.DENSE else (0,))
    longer = np.concatenate([packed, np.zeros(data.draw(st.integers(0, layout.total_slots - packed.size)))])
    for values in (packed, opened, longer):
        found_dense, found = layout.unpack(values)
        for expected, tensor in zip(dense, found_dense, strict=True):
            assert np.array_equal(tensor, expected)
            assert not np.shares_memory(tensor, values)
        for module, part, k, matrix in zip(layout.modules, parts, columns, found, strict=True):
            assert matrix.shape == (part.shape[0], module.in_features)
            assert np.array_equal(matrix[:, :k], part)
            assert not matrix[:, k:].any()


@given(layouts(), st.data())
def test_unpack_of_a_cut_vector_is_unpack_of_that_vector_with_zeros(layout: SlotLayout, data: st.DataObject) -> None:
    dense, parts = make_parts(layout, [module.in_features for module in layout.modules])
    packed = layout.pack(dense, parts)
    cut = data.draw(st.integers(layout.dense_slots, layout.total_slots))
    short = layout.unpack(packed[:cut])
    full = layout.unpack(np.where(np.arange(packed.size) < cut, packed, 0.0))
    for first, second in zip(short[0] + short[1], full[0] + full[1], strict=True):
        assert np.array_equal(first, second)


@given(layouts(), st.data())
def test_unpack_is_linear_over_agents_of_different_budgets(layout: SlotLayout, data: st.DataObject) -> None:
    total = np.zeros(layout.total_slots)
    sums = [
        np.zeros((rows, module.in_features)) for module, rows in zip(layout.modules, layout.basis_rows, strict=True)
    ]
    for _ in range(3):
        columns = draw_columns(data, layout)
        dense, parts = make_parts(layout, columns)
        packed = layout.pack(dense, parts)
        total[: packed.size] += packed
        for matrix, part, k in zip(sums, parts, columns, strict=True):
            matrix[:, :k] += part
    for found, expected in zip(layout.unpack(total)[1], sums, strict=True):
        assert np.array_equal(found, expected)


@given(layouts(), st.floats(0, 1))
def test_fraction_budgets_fill_exactly_a_prefix(layout: SlotLayout, fraction: float) -> None:
    columns = [resolve_columns(Budget.fraction(fraction), module.in_features) for module in layout.modules]
    dense, parts = make_parts(layout, columns)
    packed = layout.pack(dense, parts)
    filled = layout.dense_slots + sum(rows * k for rows, k in zip(layout.basis_rows, columns, strict=True))
    assert np.count_nonzero(packed) == filled
    exact = Fraction(repr(fraction))
    if not any(0 < exact * module.in_features < Fraction(1, 2) for module in layout.modules):
        assert packed.all()
        assert layout.used_slots(columns) == filled
        assert layout.blocks(columns) == math.ceil(layout.reals(filled) / layout.values_per_block)


@given(layouts(), st.floats(0, 1), st.floats(0, 1))
def test_smaller_fractions_send_a_prefix_of_the_blocks(layout: SlotLayout, first: float, second: float) -> None:
    low, high = (
        [resolve_columns(Budget.fraction(fraction), module.in_features) for module in layout.modules]
        for fraction in sorted((first, second))
    )
    assert layout.blocks(low) <= layout.blocks(high)
    full = layout.pack(*make_parts(layout, [module.in_features for module in layout.modules]))
    occupied = layout.pack(*make_parts(layout, low)) != 0
    assert full[: occupied.size][occupied].all()


def test_modules_of_different_width_interleave_evenly() -> None:
    """A tenth of a wide and of a narrow module ends at a tenth of the slots."""
    layout = SlotLayout((), (ModuleShape("wide", 8, 1000), ModuleShape("narrow", 8, 100)), (8, 4), 16)
    assert layout.used_slots([100, 10]) == layout.total_slots // 10


def test_large_plan_round_trips() -> None:
    widths = [3200] * 16 + [8640] * 2
    modules = tuple(ModuleShape(f"layer.{index}", 3200, n) for index, n in enumerate(widths))
    layout = SlotLayout((DenseShape("head", (2, 3200)),), modules, (16,) * len(modules), 4096)
    generator = np.random.default_rng(1)
    parts = [generator.standard_normal((16, n)) for n in widths]
    head = generator.standard_normal((2, 3200))
    packed = layout.pack([head], parts)
    assert packed.size == layout.total_slots
    dense, columns = layout.unpack(packed)
    assert np.array_equal(dense[0], head)
    assert all(np.array_equal(found, part) for found, part in zip(columns, parts, strict=True))


def test_layout_is_frozen() -> None:
    layout = SlotLayout(
        (DenseShape("head", (2,)),),
        (ModuleShape("a", 4, 3), ModuleShape("b", 4, 6), ModuleShape("c", 4, 3)),
        (2, 1, 3),
        8,
    )
    assert [layout.offsets(index).tolist() for index in range(3)] == [[3, 10, 17], [2, 8, 9, 15, 16, 22], [5, 12, 19]]
    assert layout.digest().hex() == "b2b1548027486af33195ba44a7538fcfa5037cd15d5be05f14c862c759923b1c"


def test_a_layout_without_modules_has_no_columns() -> None:
    layout = SlotLayout((DenseShape("head", (2,)),), (), (), 8)
    assert layout.total_slots == layout.used_slots([]) == 2
    with pytest.raises(IndexError):
        layout.offsets(0)


def test_offsets_are_read_only_and_computed_once() -> None:
    layout = SlotLayout((), (ModuleShape("a", 4, 3),), (2,), 8)
    offsets = layout.offsets(0)
    assert not offsets.flags.writeable
    assert np.shares_memory(offsets, layout.offsets(0))


def test_digest_tells_every_difference() -> None:
    head, a, b = DenseShape("head", (2,)), ModuleShape("a", 4, 3), ModuleShape("b", 4, 3)
    variants = [
        SlotLayout((head,), (a, b), (2, 1), 8),
        SlotLayout((), (a, b), (2, 1), 8),
        SlotLayout((head,), (b, a), (2, 1), 8),
        SlotLayout((head,), (a, b), (1, 2), 8),
        SlotLayout((head,), (a, b), (2, 1), 16),
        SlotLayout((head,), (a, b), (2, 1), 8, Packing.DENSE),
    ]
    assert len({variant.digest() for variant in variants}) == len(variants)
    assert variants[0].digest() == SlotLayout((head,), (a, b), (2, 1), 8).digest()


@pytest.mark.parametrize(("rows", "block"), [((0,), 8), ((5,), 8), ((), 8), ((1, 1), 8), ((1,), 0), ((1,), 2**20 + 1)])
def test_bad_layouts_are_refused(rows: tuple[int, ...], block: int) -> None:
    with pytest.raises(InvalidPlan):
        SlotLayout((), (ModuleShape("a", 4, 3),), rows, block)


LAYOUT = SlotLayout((DenseShape("head", (2, 2)),), (ModuleShape("a", 4, 3),), (2,), 8)


@pytest.mark.parametrize(
    ("columns", "error"), [([], SizeMismatch), ([1, 1], SizeMismatch), ([-1], ShapeMismatch), ([4], ShapeMismatch)]
)
def test_bad_column_counts_are_refused(columns: list[int], error: type[Exception]) -> None:
    with pytest.raises(error):
        LAYOUT.used_slots(columns)
    with pytest.raises(error):
        LAYOUT.blocks(columns)


@pytest.mark.parametrize(
    ("dense", "columns", "error"),
    [
        ([], [np.zeros((2, 1))], SizeMismatch),
        ([np.zeros((2, 2))], [], SizeMismatch),
        ([np.zeros(4)], [np.zeros((2, 1))], ShapeMismatch),
        ([np.zeros((2, 2))], [np.zeros((3, 1))], ShapeMismatch),
        ([np.zeros((2, 2))], [np.zeros(2)], ShapeMismatch),
        ([np.zeros((2, 2))], [np.zeros((2, 4))], ShapeMismatch),
    ],
)
def test_pack_refuses_other_shapes(dense: list[np.ndarray], columns: list[np.ndarray], error: type[Exception]) -> None:
    with pytest.raises(error):
        LAYOUT.pack(dense, columns)


@pytest.mark.parametrize("shape", [(3,), (11,), (2, 5)])
def test_unpack_refuses_other_sizes(shape: tuple[int, ...]) -> None:
    with pytest.raises(SizeMismatch, match="4 to 10"):
        LAYOUT.unpack(np.zeros(shape))
