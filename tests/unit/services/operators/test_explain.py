from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.operators.explain import (
    Participant,
    explain,
    hypothetical,
    parse_budgets,
    parse_ranks,
    parse_shapes,
)
from shelora.errors import InvalidConfiguration, InvalidPlan
from shelora.plan import DenseShape, HeRate, ModelShapes, ModuleShape, Packing

PUBLISHED = parse_shapes("104*3200x3200")


def test_the_example_of_the_method_page() -> None:
    """104 modules of 3200 x 3200, four agents of rank 4: the table of docs/method.md section 7."""
    for budget, factors, cipher, blocks, average in (
        ("full", 5.3e6, 85.2e6, 1300, 21.3e6),
        ("10%", 10.1e6, 8.5e6, 130, 40.5e6),
        ("0%", 10.6e6, 0, 0, 42.6e6),
    ):
        found = explain(PUBLISHED, hypothetical(PUBLISHED, [4] * 4, [budget]))
        cost = found.agents[0]
        assert found.basis_rows == (16,) * 104
        assert found.exact
        assert cost.blocks == blocks
        assert cost.factors_bytes == pytest.approx(factors, abs=0.05e6)
        assert cost.cipher_up_bytes == pytest.approx(cipher, abs=0.05e6)
        assert cost.average_bytes == pytest.approx(average, abs=0.05e6)
        assert cost.cipher_down_bytes == cost.cipher_up_bytes
        assert cost.projection_bytes == 4 * 104 * 16 * 4


def test_dense_packing_halves_the_ciphertext_of_the_example() -> None:
    """At most 45 MB an agent where everything is encrypted; the ranges are 4 bytes a basis row."""
    exact = explain(PUBLISHED, hypothetical(PUBLISHED, [4] * 4, ["full"])).agents[0]
    participants = hypothetical(PUBLISHED, [4] * 4, ["full"], packing=Packing.DENSE)
    dense = explain(PUBLISHED, participants, packing=Packing.DENSE).agents[0]
    assert dense.blocks == 650
    assert dense.cipher_up_bytes == dense.cipher_down_bytes == 42_598_400 <= 45e6
    assert dense.factors_bytes == exact.factors_bytes
    assert dense.projection_bytes - exact.projection_bytes == 4 * 104 * 16
    assert dense.average_bytes - exact.average_bytes == 4 * 104 * 16


@given(
    m=st.integers(8, 60),
    n=st.integers(8, 60),
    ranks=st.lists(st.integers(1, 8), min_size=1, max_size=5),
    dense=st.integers(1, 5000),
    data=st.data(),
)
def test_bytes_by_hand(m, n, ranks, dense, data) -> None:
    shapes = ModelShapes((ModuleShape("a", m, n), ModuleShape("b", m, n)), (DenseShape("d", (dense,)),))
    columns = [data.draw(st.integers(0, n)) for _ in ranks]
    participants = [
        Participant(f"p{i}", rank, "", (k, k)) for i, (rank, k) in enumerate(zip(ranks, columns, strict=True))
    ]
    found = explain(shapes, participants)
    s = min(sum(ranks), 4 * max(ranks), m)
    assert found.basis_rows == (s, s)
    for cost, rank, k in zip(found.agents, ranks, columns, strict=True):
        assert cost.factors_bytes == 4 * 2 * (m * rank + rank * (n - k))
        assert cost.blocks == -(-(dense + 2 * s * k) // 4096)
        assert cost.cipher_up_bytes == 65_536 * cost.blocks
        assert cost.projection_bytes == 4 * 2 * s * rank
        assert cost.average_bytes == 4 * 2 * (m * s + s * (n - min(columns)))
        assert cost.cipher_down_bytes == 65_536 * -(-(dense + 2 * s * max(columns)) // 4096)
        assert cost.up_bytes == cost.factors_bytes + cost.cipher_up_bytes
        assert cost.down_bytes == cost.projection_bytes + cost.average_bytes + cost.cipher_down_bytes


def test_auto_encrypts_what_its_seconds_allow() -> None:
    slow, fast = HeRate(1e5, 1e5), HeRate(1e9, 1e9)
    few = hypothetical(PUBLISHED, [4], ["auto:10s"], rate=slow)[0].columns
    assert 0 < few[0] < 100
    assert hypothetical(PUBLISHED, [4], ["auto:10s"], rate=fast)[0].columns == (3200,) * 104


def test_a_cap_below_the_ranks_is_said_to_be_inexact() -> None:
    assert not explain(PUBLISHED, hypothetical(PUBLISHED, [4] * 5, ["full"])).exact
    assert explain(PUBLISHED, hypothetical(PUBLISHED, [4] * 5, ["full"]), cap=20).exact


def test_no_agents_and_no_budgets_are_refused() -> None:
    with pytest.raises(InvalidConfiguration, match="at least one agent"):
        explain(PUBLISHED, [])
    with pytest.raises(InvalidConfiguration, match="at least one budget"):
        hypothetical(PUBLISHED, [4], [])


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
