from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from services.operators.demo.compare import comparison_table, read_comparison
from services.operators.demo.options import DemoOptions
from services.operators.demo.report import accuracies, byte_ratios, make_report, predicted_costs
from services.operators.demo.verify import RoundCheck, Verification
from services.operators.domain import Round
from services.operators.render import as_json
from shelora.errors import StoredBytesCorrupt
from shelora.rounds.phases import RoundPhase
from support.operators import make_federation, make_member, make_round

OPTIONS = DemoOptions(
    data=Path("train.jsonl"),
    test=None,
    model="embedded",
    ranks=(4, 8),
    budgets=("full", "25%"),
    rounds=2,
    compare=False,
    out=Path("build/demo"),
)


def check(number: int, error: float = 2e-9) -> RoundCheck:
    return RoundCheck(number, ("agent-1", "agent-2"), ("agent-1", "agent-2"), 1000, 2000, error, "module 0 of agent-1")


def report(rounds: list[Round], verification: Verification) -> dict[str, Any]:
    made = make_report(
        OPTIONS,
        make_federation(),
        rounds,
        verification,
        {"agent-1": "a/1", "agent-2": "a/2"},
        {"agent-1": {"x": 5, "y": 6}, "agent-2": {"x": 1, "y": 2}},
        50,
        {"total": 12.5},
        None,
    )
    parsed: dict[str, Any] = json.loads(as_json(made))
    return parsed


def test_report_holds_what_is_promised() -> None:
    second = make_round(
        2,
        make_member("agent-1", 4, 32, accuracy_before=0.6, accuracy_after=0.8, bytes_up=66_536.0, bytes_down=70_000.0),
        make_member("agent-2", 8, 8, accuracy_before=0.7, accuracy_after=0.81, bytes_up=66_536.0, bytes_down=70_001.0),
    )
    made = report([make_round(1), second], Verification((check(1), check(2, 5e-9))))

    assert made["accuracy"] == {
        "before": {"agent-1": 0.2, "agent-2": 0.25},
        "after": {"agent-1": 0.8, "agent-2": 0.81},
    }
    assert made["verification"]["max_abs_error"] == 5e-9
    assert made["verification"]["values"] == 2000
    assert made["verification"]["passed"] is True
    assert [found["round"] for found in made["rounds"]] == [1, 2]
    assert made["rounds"][1]["cohort"] == ["agent-1", "agent-2"]
    assert made["rounds"][1]["bytes_up"] == {"agent-1": 66_536, "agent-2": 66_536}
    assert made["rounds"][1]["bytes_down"] == {"agent-1": 70_000, "agent-2": 70_001}
    assert made["rounds"][1]["cipher_bytes_up"] == {"agent-1": 65_536, "agent-2": 65_536}
    assert made["rounds"][1]["seconds"]["train"] == 5.0
    assert made["rounds"][1]["max_abs_error"] == 5e-9
    assert made["adapters"] == {"agent-1": "a/1", "agent-2": "a/2"}
    assert made["agents"]["agent-2"] == {"rank": 8, "budget": "25%", "columns": [8, 8], "examples": {"x": 1, "y": 2}}
    assert made["plan"]["modules"][0] == ["layer.0.query", 24, 32]
    assert made["versions"]["python"]


def test_an_error_that_is_no_number_is_null_and_not_passed() -> None:
    made = report([make_round(1)], Verification((check(1, float("nan")),)))
    assert made["verification"]["max_abs_error"] is None
    assert made["verification"]["passed"] is False
    assert made["rounds"][0]["max_abs_error"] is None


def test_abandoned_rounds_are_listed_but_count_for_nothing() -> None:
    lost = make_round(2, make_member("agent-1", 4, 32, accuracy_after=0.1), phase=RoundPhase.ABANDONED)
    made = report([make_round(1), lost], Verification((check(1),)))
    assert made["rounds"][1]["phase"] == "abandoned"
    assert made["accuracy"]["after"]["agent-1"] == 0.6
    assert "max_abs_error" not in made["rounds"][1]


def test_an_agent_that_never_reported_has_no_accuracy() -> None:
    found = accuracies([make_round(1)], ["agent-1", "agent-9"])
    assert found["before"]["agent-9"] is None
    assert found["after"]["agent-9"] is None


def test_predicted_bytes_follow_the_formulas() -> None:
    costs = predicted_costs(make_federation(), make_round(1))
    # two modules of 24 x 32, ranks 4 + 8 = 12 basis rows, 144 dense values, k = 32 and 8
    assert costs["agent-1"].factors_bytes == 4 * 2 * 24 * 4
    assert costs["agent-2"].factors_bytes == 4 * 2 * (24 * 8 + 8 * 24)
    assert costs["agent-1"].cipher_up_bytes == 65_536
    assert costs["agent-1"].average_bytes == 4 * 2 * 12 * (24 + 24)
    ratios = byte_ratios(make_federation(), [make_round(1)])
    assert ratios == [pytest.approx(66_536 / costs[agent].up_bytes) for agent in ("agent-1", "agent-2")]


def test_no_prediction_when_a_member_was_left_out_or_no_plan_is_known() -> None:
    partial = make_round(1, make_member("agent-1", 4, 32), make_member("agent-2", 8, 8, counted=False))
    assert predicted_costs(make_federation(), partial) == {}
    assert predicted_costs(make_federation(planned=False), make_round(1)) == {}
    assert byte_ratios(make_federation(), [partial]) == []


def test_comparison_takes_the_first_and_the_last_round(tmp_path) -> None:
    path = tmp_path / "plaintext.json"
    rounds = [
        {"round": number, "agents": [{"agent": "agent-1", "accuracy_before": before, "accuracy_after": after}]}
        for number, before, after in ((1, 0.2, 0.5), (2, 0.5, 0.75))
    ]
    path.write_text(json.dumps({"rounds": rounds}))
    found = read_comparison(path, ["agent-1"])
    assert found["accuracy"] == {"before": {"agent-1": 0.2}, "after": {"agent-1": 0.75}}
    table = comparison_table({"agent-1": 0.76}, found["accuracy"]["after"])
    assert [[str(cell) for cell in row] for row in table.rows] == [["agent-1", "76.0%", "75.0%", "+1.00"]]
    assert str(comparison_table({}, {"agent-1": 0.5}).rows[0][3]) == "-"


@pytest.mark.parametrize("content", ["", "{}", '{"rounds": []}', '{"rounds": [{"agents": []}]}'])
def test_an_unusable_comparison_is_an_error(tmp_path, content) -> None:
    path = tmp_path / "plaintext.json"
    path.write_text(content)
    with pytest.raises(StoredBytesCorrupt, match="plaintext run"):
        read_comparison(path, ["agent-1"])
