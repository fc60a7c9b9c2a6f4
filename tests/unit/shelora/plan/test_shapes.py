from __future__ import annotations

import pytest

from shelora.errors import InvalidPlan
from shelora.plan import DenseShape, ModelShapes, ModuleShape
from shelora.plan.shapes import MAX_DIMENSION, MAX_TENSORS

QUERY = ModuleShape("layer.0.query", 8, 6)
VALUE = ModuleShape("layer.0.value", 8, 6)
HEAD = DenseShape("classifier.weight", (2, 8))


def test_sizes() -> None:
    assert HEAD.size == 16
    assert DenseShape("scale", ()).size == 1


@pytest.mark.parametrize("name", ["", "x" * 513, "line\nbreak", "nul\0", "\ud800"])
def test_bad_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidPlan, match="printable"):
        ModuleShape(name, 1, 1)
    with pytest.raises(InvalidPlan, match="printable"):
        DenseShape(name, (1,))


@pytest.mark.parametrize("size", [0, -1, MAX_DIMENSION + 1])
def test_bad_widths_are_refused(size: int) -> None:
    with pytest.raises(InvalidPlan, match=f"output width .* got {size}"):
        ModuleShape("m", size, 1)
    with pytest.raises(InvalidPlan, match=f"input width .* got {size}"):
        ModuleShape("m", 1, size)
    with pytest.raises(InvalidPlan, match=f"got {size}"):
        DenseShape("d", (3, size))


def test_bounds_are_inclusive() -> None:
    assert ModuleShape("x" * 512, MAX_DIMENSION, 1).out_features == MAX_DIMENSION
    assert DenseShape("d", (MAX_DIMENSION, 1000)).size == 1_000_000_000


def test_too_large_dense_tensors_are_refused() -> None:
    with pytest.raises(InvalidPlan, match="at most 1000000000 values"):
        DenseShape("d", (MAX_DIMENSION, 1001))
    with pytest.raises(InvalidPlan, match="at most 8 axes"):
        DenseShape("d", (1,) * 9)


def test_names_are_unique_across_kinds() -> None:
    with pytest.raises(InvalidPlan, match="twice"):
        ModelShapes((QUERY, QUERY), ())
    with pytest.raises(InvalidPlan, match="twice"):
        ModelShapes((QUERY,), (DenseShape(QUERY.name, (1,)),))


def test_nothing_or_too_much_to_train_is_refused() -> None:
    with pytest.raises(InvalidPlan, match="got 0"):
        ModelShapes((), ())
    with pytest.raises(InvalidPlan, match=f"got {MAX_TENSORS + 1}"):
        ModelShapes((QUERY,) * (MAX_TENSORS + 1), ())


def test_digest_tells_every_difference() -> None:
    variants = [
        ModelShapes((QUERY, VALUE), (HEAD,)),
        ModelShapes((VALUE, QUERY), (HEAD,)),
        ModelShapes((QUERY,), (HEAD,)),
        ModelShapes((QUERY, VALUE), ()),
        ModelShapes((ModuleShape(QUERY.name, 6, 8), VALUE), (HEAD,)),
        ModelShapes((QUERY, VALUE), (DenseShape(HEAD.name, (16,)),)),
        ModelShapes((QUERY, VALUE), (DenseShape(HEAD.name, (8, 2)),)),
    ]
    assert len({variant.digest() for variant in variants}) == len(variants)
    assert variants[0].digest() == ModelShapes((QUERY, VALUE), (HEAD,)).digest()
    assert len({*variants, ModelShapes((QUERY, VALUE), (HEAD,))}) == len(variants)


def test_digest_is_frozen() -> None:
    shapes = ModelShapes((QUERY, VALUE), (HEAD, DenseShape("scale", ())))
    assert shapes.digest().hex() == "399cc51024cfa5da05cd29322f0a207ef3285c04296644480ea6019321d9e66b"
