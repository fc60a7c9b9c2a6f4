"""Everything in one value that JSON can hold, with the verdict."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest

from services.operators.leakage import Level
from services.operators.planning import Explanation, Terms, explain, imagine, parse_shapes, require_safe
from services.operators.render import as_json
from shelora.errors import UnsafePlan

SHAPES = parse_shapes("19*384x384,dense*2310")


def plan_of(ranks: list[int], budgets: list[str], **changes: int) -> Explanation:
    terms = Terms(**changes)  # type: ignore[arg-type]  # whole numbers only
    return explain(SHAPES, imagine(SHAPES, ranks, budgets, terms), terms)


def test_defaults_come_out_safe() -> None:
    found = plan_of([8] * 4, ["full"])
    assert (found.level, found.unsafe) == (Level.SAFE, ())
    require_safe(found.verdicts)
    assert found.security.bits == 128


def test_unsafe_settings_are_named_and_refused() -> None:
    found = plan_of([4, 8, 16, 32], ["full", "25%", "5%", "99%"])
    assert found.level is Level.UNSAFE
    assert found.unsafe == ("agent-2", "agent-3"), "4 plain columns of 384 are fewer than the rank of agent-4"
    assert {verdict.agent: verdict.level for verdict in found.verdicts}["agent-4"] is Level.CAUTION
    with pytest.raises(UnsafePlan, match=r"unsafe ones for agent-2, agent-3: 25\.0% of the columns") as caught:
        require_safe(found.verdicts)
    assert "--allow-unsafe" in caught.value.hint
    assert caught.value.context == {"agents": "agent-2,agent-3"}


def test_many_unsafe_agents_are_counted() -> None:
    with pytest.raises(UnsafePlan, match="agent-6 and 3 more: "):
        require_safe(plan_of([8] * 9, ["1%"]).verdicts)


def test_the_verdict_knows_the_whole_cohort_and_how_agents_train() -> None:
    assert plan_of([8] * 2, ["full"]).level is Level.CAUTION
    assert plan_of([8] * 2, ["full"], target_agents=5).level is Level.SAFE
    assert plan_of([8] * 4, ["full"], batch_size=1, steps=1).level is Level.CAUTION


def test_dense_tensors_alone_are_safe_unless_two_agents_share_them() -> None:
    shapes = parse_shapes("dense*10")
    assert explain(shapes, imagine(shapes, [4] * 3, ["5%"])).level is Level.SAFE
    assert explain(shapes, imagine(shapes, [4] * 2, ["5%"])).level is Level.CAUTION


def test_everything_is_in_the_json() -> None:
    found = json.loads(as_json(plan_of([4, 8], ["full", "25%"])))
    assert found.keys() == {field.name for field in fields(Explanation)}
    assert found["level"] == "unsafe"
    assert found["verdicts"][1]["agent"] == "agent-2"
    assert "only the secret order" in found["verdicts"][1]["remarks"][0]["text"]
    assert found["agents"][0]["up_bytes"] > 0
    assert found["aggregator"]["ram_ceiling_bytes"] > found["aggregator"]["peak_ram_bytes"] > 0
    assert found["security"]["bits"] == 128
    assert found["basis"]["exact"] is True
    assert found["precision"]["bound"] > found["precision"]["typical"] > 0
    assert found["rates"]["measured"] is False


def test_the_summary_is_one_line() -> None:
    summary = plan_of([4, 8, 16, 32], ["full", "25%", "5%", "auto"]).summary
    assert "\n" not in summary
    for part in ("4 agents", "1.3 to 8.0 MB up", "the average is exact", "128-bit", "unsafe for agent-2, agent-3"):
        assert part in summary, summary
    assert plan_of([4] * 3, ["full"]).summary.endswith("leakage: safe")
