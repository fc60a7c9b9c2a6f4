from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench.sources import ROOT
from bench.speed.load import Run, read_run, read_scale, read_workload
from shelora.errors import InvalidConfiguration
from shelora.plan import Packing

DATA = ROOT / "bench" / "speed"
RUN = Run(agents=2, modules=3, out_features=8, in_features=6, ranks=(2, 4), budgets=("50%",))


def test_the_published_workload_is_that_of_the_published_benchmark() -> None:
    workload = read_workload(DATA / "published.json")
    assert next(iter(workload.runs)) == "0.125% exact"
    for run in workload.runs.values():
        assert (run.agents, run.modules, run.out_features, run.in_features, run.ranks) == (4, 104, 3200, 3200, (4,))
    assert workload.runs["full dense"].packing is Packing.DENSE
    assert workload.published["0.125%"]["up_mb"] == 24.5


def test_a_run_survives_the_way_to_another_process(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    run = replace(RUN, packing=Packing.DENSE)
    run.save(path)
    assert read_run(path) == run


def test_sweeps_change_one_size_each() -> None:
    scale = read_scale(DATA / "scale.json")
    assert set(scale.sweeps) == {"agents", "rank", "width", "modules"}
    for sweep, values in scale.sweeps.items():
        changed = scale.at(sweep, values[-1])
        kept = {
            "agents": changed.agents,
            "rank": changed.ranks,
            "width": changed.in_features,
            "modules": changed.modules,
        }
        base = scale.base
        before = {"agents": base.agents, "rank": base.ranks, "width": base.in_features, "modules": base.modules}
        assert [name for name in kept if kept[name] != before[name]] == [sweep]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"agents": 4}', '{"base": {}, "sweeps": {}}'])
def test_files_that_say_something_else_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "workload.json"
    path.write_text(content)
    with pytest.raises(InvalidConfiguration, match=r"workload.json: expected"):
        read_workload(path)
    with pytest.raises(InvalidConfiguration, match=r"workload.json: expected"):
        read_scale(path)


@pytest.mark.parametrize("changed", [{"agents": 0}, {"ranks": ()}, {"budgets": ("much",)}])
def test_impossible_runs_are_refused(changed: dict[str, object]) -> None:
    with pytest.raises(InvalidConfiguration):
        replace(RUN, **changed)  # type: ignore[arg-type]  # one field each
