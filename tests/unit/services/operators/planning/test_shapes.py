from __future__ import annotations

import json

import pytest

from services.operators.planning import parse_budgets, parse_ranks, parse_shapes
from shelora.errors import InvalidConfiguration, InvalidPlan
from shelora.plan import DenseShape, ModelShapes, ModuleShape


def test_shapes_from_short_form_and_file(tmp_path) -> None:
    short = parse_shapes("2*24x32, 16x8, dense*100, dense*7")
    assert [(module.out_features, module.in_features) for module in short.modules] == [(24, 32), (24, 32), (16, 8)]
    assert [tensor.size for tensor in short.dense] == [100, 7]
    path = tmp_path / "shapes.json"
    path.write_text(
        json.dumps(
            {
                "modules": [{"name": "q", "out_features": 24, "in_features": 32}],
                "dense": [{"name": "head", "shape": [6, 24]}],
            }
        )
    )
    assert parse_shapes(str(path)) == ModelShapes((ModuleShape("q", 24, 32),), (DenseShape("head", (6, 24)),))


@pytest.mark.parametrize("text", ["", "24", "x32", "2*24", "dense*3x4", "24x32x2", "-1x3"])
def test_bad_short_forms_are_refused(text) -> None:
    with pytest.raises(InvalidConfiguration, match="short form"):
        parse_shapes(text)


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{",
        '{"modules": [{"name": "q"}]}',
        '{"modules": [{"name": "q", "out_features": 1.5, "in_features": 2}]}',
    ],
)
def test_bad_shape_files_are_refused(tmp_path, content) -> None:
    path = tmp_path / "shapes.json"
    path.write_text(content)
    with pytest.raises(InvalidConfiguration, match="lists of modules"):
        parse_shapes(str(path))
    with pytest.raises(InvalidConfiguration, match="readable file"):
        parse_shapes(str(tmp_path / "none.json"))


def test_impossible_shapes_are_refused() -> None:
    with pytest.raises(InvalidPlan):
        parse_shapes("0x5")


def test_ranks_and_budgets() -> None:
    assert parse_ranks(" 4, 8 ") == [4, 8]
    assert parse_budgets("full, 5%,20 columns") == ["full", "5%", "20 columns"]
    for text in ("", "4,,8", "1025", "4.5"):
        with pytest.raises(InvalidConfiguration):
            parse_ranks(text)
    with pytest.raises(InvalidConfiguration):
        parse_budgets("full,some")
