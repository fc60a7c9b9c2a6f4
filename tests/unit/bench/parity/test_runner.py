from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench.parity import runner
from bench.parity.scenarios import METHODS, units
from bench.parity.studies import ROUTING, SKEW

SECTIONS = ("parity_run", "parity_routing", "parity_skew")
PAGE = "\n".join(f"<!-- generated: {name} -->\nold {name}\n<!-- end -->" for name in SECTIONS)


@pytest.fixture
def page(corpus, tmp_path, monkeypatch) -> Path:
    path = tmp_path / "benchmarks.md"
    path.write_text(PAGE, encoding="utf-8")
    monkeypatch.setattr(runner, "PAGE", path)
    monkeypatch.setattr(runner, "load_corpus", lambda: corpus)
    monkeypatch.setattr(runner, "_read_messages", lambda: replace(corpus, name="messages"))
    return path


def refuse():
    raise AssertionError("no unit was to run")


def test_the_routing_study_is_exact_and_keeping_on_the_skewed_split(setting):
    chosen = replace(setting, seeds=(0, 1))
    found = ROUTING.units(ROUTING.change(chosen), refuse)
    assert list(found) == [f"routing-{key}-skewed-{seed}" for seed in (0, 1) for key in ("exact", "keeping")]
    assert len(units(chosen, refuse)) == 2 * (len(METHODS) + 1)


def test_ways_to_train_one_sided_agents_differ_in_their_draws_alone(setting):
    defaults, occurring = (side.change(setting) for side in SKEW)
    assert defaults == replace(setting, concentrations={"one-sided": 0.1})
    assert occurring == replace(defaults, label_balance=0.0)
    assert [list(side.units(side.change(setting), refuse)) for side in SKEW] == [
        [f"{side.name}-exact-one-sided-0"] for side in SKEW
    ]


def test_routing_alone_is_measured_once_and_publishes_its_own_section(page, setting, tmp_path, monkeypatch):
    out = tmp_path / "out"
    runner.run(out, fresh=False, setting=setting, only="routing")
    assert page.read_text(encoding="utf-8") == PAGE
    assert sorted(path.name for path in (out / "routing" / "records").iterdir()) == [
        "routing-exact-skewed-0.json",
        "routing-keeping-skewed-0.json",
    ]
    assert "## The same with more classes" in (out / "report.md").read_text(encoding="utf-8")

    monkeypatch.setattr(runner, "draw_keys", refuse)
    runner.run(out, fresh=False, publish=True, setting=setting, only="routing")
    published = page.read_text(encoding="utf-8")
    assert "old parity_run" in published
    assert "old parity_routing" not in published
    assert "36 messages to learn from, 12 to test on" in published
    assert "seeds 0" in published
    assert (page.parent / "plots" / "ranks-routing.svg").is_file()
    report = (out / "report.md").read_text(encoding="utf-8")
    for row in ("exact, %", "residual kept, %", "residual kept, exported, %", "2"):
        assert f"\n| {row} | " in report


def test_one_sided_agents_are_trained_both_ways_side_by_side(page, setting, tmp_path):
    runner.run(tmp_path, fresh=False, publish=True, setting=setting, only="onesided")
    published = page.read_text(encoding="utf-8")
    assert "old parity_routing" in published
    assert "old parity_skew" not in published
    assert "have the same label (median " in published
    assert "| training | round 1, % | round 2, % |" in published
    for side in SKEW:
        assert published.count(f"\n| {side.title} | ") == 1


def test_a_whole_run_refuses_a_page_with_a_section_that_nothing_writes(page, setting, tmp_path):
    names = (*SECTIONS, "parity_claims", "parity_accuracy", "parity_beside", "parity_dilution")
    complete = "\n".join(f"<!-- generated: {name} -->\nold\n<!-- end -->" for name in names)
    stale = f"{complete}\n<!-- generated: parity_gone -->\nold\n<!-- end -->"
    page.write_text(stale, encoding="utf-8")
    with pytest.raises(ValueError, match="parity_gone"):
        runner.run(tmp_path / "out", fresh=False, publish=True, setting=setting)
    assert page.read_text(encoding="utf-8") == stale

    page.write_text(complete, encoding="utf-8")
    runner.run(tmp_path / "out", fresh=False, publish=True, setting=setting)
    assert "\nold\n" not in page.read_text(encoding="utf-8")


def test_a_study_measured_in_part_keeps_its_records_and_reports_nothing(page, setting, tmp_path):
    runner.run(tmp_path, fresh=False, publish=True, setting=setting, only="routing-exact")
    assert [path.name for path in (tmp_path / "routing" / "records").iterdir()] == ["routing-exact-skewed-0.json"]
    assert not list(tmp_path.rglob("report.md"))
    assert page.read_text(encoding="utf-8") == PAGE


def test_the_messages_of_the_demonstration_are_there_with_or_without_reviews():
    found = runner._read_messages()
    assert found.name == "routing messages of 6 classes"
    assert (len(found.train), len(found.test)) == (1800, 432)
