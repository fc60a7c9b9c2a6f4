from __future__ import annotations

import json
from pathlib import Path

from bench.audit.report import budgets, defaults
from bench.audit.runner import _code, _kept


def test_records_are_kept_for_the_same_code_and_texts_only(tmp_path: Path) -> None:
    path = tmp_path / "budgets.json"
    assert _kept(path, {"version": "a"}) is None
    path.write_text(json.dumps({"stamp": {"version": "a"}, "seconds": 1.0, "records": []}))
    assert _kept(path, {"version": "a"}) is not None
    assert _kept(path, {"version": "b"}) is None


def test_comments_and_docstrings_are_no_new_code(tmp_path: Path) -> None:
    one, two, three = (tmp_path / name for name in ("one.py", "two.py", "three.py"))
    one.write_text('"""Doc."""\nx = 1\n')
    two.write_text('"""Other."""\n\nx = 1  # why\n')
    three.write_text('"""Doc."""\nx = 2\n')
    assert _code(one) == _code(two)
    assert _code(one) != _code(three)


def test_cells_give_the_range_of_repeats_and_a_dash_for_nothing() -> None:
    records = [{"budget": "1%", "attacker": "order unknown", "recall": recall} for recall in (0.1, 0.3)]
    assert budgets(records, "recall").splitlines()[-1] == "| 1% | - | - | - | - | - | - | 10 to 30 % |"


def test_leakage_comes_with_its_error() -> None:
    records = [{"budget": "full", "attacker": "left factors only", "leakage": 0.012, "error": 0.01}]
    assert "| full | 1.2 ± 1.0 % |" in defaults(records)
