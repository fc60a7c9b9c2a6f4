from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from services.operators.demo.options import DEFAULT_BUDGETS, DEFAULT_RANKS, DemoOptions, choose
from shelora.errors import InvalidConfiguration

DEFAULTS: dict[str, Any] = {
    "data": None,
    "test": None,
    "model": "embedded",
    "agents": None,
    "rounds": 3,
    "ranks": DEFAULT_RANKS,
    "budgets": DEFAULT_BUDGETS,
    "compare": None,
    "out": Path("build/demo"),
}


def options(**changes: Any) -> DemoOptions:
    return choose(**{**DEFAULTS, **changes})


def test_defaults_are_four_unequal_agents_on_the_example() -> None:
    chosen = options()
    assert chosen.ranks == (4, 8, 16, 32)
    assert chosen.budgets == ("full", "25%", "5%", "auto")
    assert chosen.names == ("agent-1", "agent-2", "agent-3", "agent-4")
    assert chosen.data.is_file()
    assert chosen.test is not None
    assert chosen.test.is_file()
    assert chosen.basis_cap == 0


@pytest.mark.parametrize(
    ("changes", "ranks"),
    [
        ({"agents": 2}, (4, 8)),
        ({"agents": 6}, (4, 8, 16, 32, 4, 8)),
        ({"ranks": "8"}, (8, 8, 8, 8)),
        ({"ranks": "1,2,3,4,5"}, (1, 2, 3, 4, 5)),
    ],
)
def test_ranks_are_repeated_over_the_agents(changes, ranks) -> None:
    chosen = options(**changes)
    assert chosen.ranks == ranks
    assert len(chosen.budgets) == len(ranks)


def test_basis_cap_grows_with_the_ranks_so_that_the_average_stays_exact() -> None:
    assert options(ranks="8", agents=4).basis_cap == 0
    assert options(ranks="8", agents=5).basis_cap == 40


def test_a_folder_becomes_absolute_and_a_hub_id_stays(tmp_path, monkeypatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert options(model="model").model == str(tmp_path / "model")
    assert options(model="someone/encoder").model == "someone/encoder"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"agents": 1}, "agents: expected 2 to 64, got 1"),
        ({"rounds": 0}, "rounds: expected 1 to 1000, got 0"),
        ({"ranks": "4,x"}, "ranks: expected whole numbers"),
        ({"ranks": "0"}, "ranks: expected whole numbers"),
        ({"budgets": "most"}, "expected a budget, got 'most'"),
        ({"compare": "nothing"}, "compare: expected plaintext"),
        ({"test": Path("t.jsonl")}, "test: expected data as well"),
        ({"concentration": 0.0}, "above 0"),
    ],
)
def test_unusable_options_are_refused(changes, message) -> None:
    with pytest.raises(InvalidConfiguration, match=message):
        options(**changes)
