from __future__ import annotations

from bench.audit.report import budgets, defaults


def test_cells_give_the_range_of_repeats_and_a_dash_for_nothing() -> None:
    records = [{"budget": "1%", "attacker": "order unknown", "recall": recall} for recall in (0.1, 0.3)]
    assert budgets(records, "recall").splitlines()[-1] == "| 1% | - | - | - | - | - | - | 10 to 30 % |"


def test_leakage_comes_with_its_error() -> None:
    records = [{"budget": "full", "attacker": "left factors only", "leakage": 0.012, "error": 0.01}]
    assert "| full | 1.2 ± 1.0 % |" in defaults(records)
