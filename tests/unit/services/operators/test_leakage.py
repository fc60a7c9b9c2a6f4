"""Verdicts from the published table."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from services.operators.cli import app
from services.operators.leakage import Basis, Level, Settings, judge, load_table
from shelora.errors import InvalidConfiguration, StoredBytesCorrupt

WIDTHS = (384,) * 19
DEFAULTS = Settings("agent-1", 8, WIDTHS, WIDTHS, agents=4)


def columns(count: int) -> tuple[int, ...]:
    return (count,) * len(WIDTHS)


def level(**changes) -> Level:
    return judge(replace(DEFAULTS, **changes)).level


def test_defaults_are_safe_and_every_remark_says_what_it_rests_on() -> None:
    verdict = judge(DEFAULTS)
    assert verdict.level is Level.SAFE
    assert {remark.level for remark in verdict.remarks} == {Level.SAFE}
    assert {remark.basis for remark in verdict.remarks} == {Basis.MEASURED, Basis.ARGUED}


@pytest.mark.parametrize("count", [0, 1, 4, 38, 192, 346, 375])
def test_plain_columns_beyond_the_rank_are_unsafe(count) -> None:
    verdict = judge(replace(DEFAULTS, columns=columns(count)))
    assert verdict.level is Level.UNSAFE
    assert any("only the secret order" in remark.text for remark in verdict.remarks)


def test_plain_columns_within_the_rank_are_a_caution() -> None:
    assert level(columns=columns(376)) is Level.CAUTION


def test_one_module_is_enough() -> None:
    assert level(columns=(0, *WIDTHS[1:])) is Level.UNSAFE


def test_a_single_encrypted_column_is_named() -> None:
    assert any("up to its sign" in remark.text for remark in judge(replace(DEFAULTS, columns=columns(1))).remarks)


def test_few_texts_two_agents_and_single_steps_are_cautions() -> None:
    assert level(examples=16) is Level.CAUTION
    assert level(agents=2) is Level.CAUTION
    single = judge(replace(DEFAULTS, batch_size=1, steps=1))
    assert single.level is Level.CAUTION
    assert any("plain gradient step" in remark.text for remark in single.remarks)


def test_a_verdict_follows_the_table() -> None:
    table = json.loads(json.dumps(load_table()))
    for row in table["trainings"]:
        row.update(left=0.5, left_error=0.01)
    assert judge(DEFAULTS, table).level is Level.CAUTION
    for row in table["membership"]:
        row.update(average=0.9)
    assert sum(remark.level is Level.CAUTION for remark in judge(DEFAULTS, table).remarks) == 2


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(InvalidConfiguration):
        replace(DEFAULTS, examples=0)
    with pytest.raises(InvalidConfiguration):
        replace(DEFAULTS, columns=(1,))


def test_a_missing_table_is_a_damaged_installation(tmp_path) -> None:
    with pytest.raises(StoredBytesCorrupt):
        load_table(tmp_path / "none.json")


def test_the_command_judges_imagined_agents() -> None:
    wanted = ["audit", "--ranks", "8,8", "--budgets", "full,1%", "--model-shapes", "19*384x384", "--json"]
    found = CliRunner().invoke(app, wanted)
    assert found.exit_code == 0, found.output
    assert [verdict["level"] for verdict in json.loads(found.output)] == ["caution", "unsafe"], "two agents: a caution"
    shown = CliRunner().invoke(app, wanted[:-1])
    assert "agent-2: unsafe" in shown.output


def test_without_modules_only_averages_are_judged() -> None:
    verdict = judge(replace(DEFAULTS, widths=(), columns=()))
    assert verdict.level is Level.SAFE
    assert not any("factors" in remark.text for remark in verdict.remarks)
    assert replace(DEFAULTS, widths=(), columns=()).plain == 0


def test_the_command_needs_ranks_and_shapes_together() -> None:
    assert CliRunner().invoke(app, ["audit", "--ranks", "8"]).exit_code == 2
