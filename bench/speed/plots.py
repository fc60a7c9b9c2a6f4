"""Plots of a run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from bench.plots import Draw
from bench.records import Record, choose
from bench.speed.load import Workload
from bench.speed.report import MB, Records, median


def draws(records: Records, workload: Workload) -> dict[str, Draw]:
    """What draws each plot, by file name."""
    scales = {name.removeprefix("scale "): found for name, found in records.items() if name.startswith("scale ")}
    return {
        "workload": partial(_workload, records=records, workload=workload),
        "price": partial(_price, records=records["price"]),
        "scale": partial(_scale, scales=scales),
    }


def _workload(axes: Any, records: Records, workload: Workload) -> None:
    """Seconds of the published workload, ours and the re-created procedure."""
    names = [name for name, run in workload.runs.items() if run.packing.value == "exact"]
    ours = [median(choose(records[name], part="round"), "seconds") for name in names]
    theirs = [choose(records["baseline"], part="workload", run=name)[0]["total_s"] for name in names]
    places = range(len(names))
    axes.bar([place - 0.2 for place in places], theirs, 0.4, label="published procedure, re-created", color="tab:gray")
    axes.bar([place + 0.2 for place in places], ours, 0.4, label="shelora, whole path", color="tab:blue")
    for place, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        axes.annotate(f"{other / mine:,.0f} x", (place + 0.2, mine), ha="center", va="bottom")
    axes.set_yscale("log")
    axes.set_xticks(list(places), [workload.runs[name].budget(0) for name in names])
    axes.set_xlabel("columns encrypted")
    axes.set_ylabel("seconds a round")
    axes.set_title("4 agents, 104 modules of 3200 x 3200, rank 4, on one machine")
    axes.legend()


def _price(axes: Any, records: Sequence[Record]) -> None:
    methods = list(dict.fromkeys(record["method"] for record in records))
    last = [choose(records, method=method, part="round")[-1] for method in methods]
    up, down = ([record[key] / MB for record in last] for key in ("bytes_up", "bytes_down"))
    axes.barh(methods, up, color="tab:blue", label="up")
    axes.barh(methods, down, left=up, color="tab:orange", label="down")
    axes.invert_yaxis()
    axes.set_xlabel("MB an agent and round")
    axes.set_title("Bytes against plaintext averaging, rank 8, 4 agents")
    axes.legend()


def _scale(axes: Any, scales: dict[str, Sequence[Record]]) -> None:
    for sweep, found in scales.items():
        steps = [record["value"] / found[0]["value"] for record in found]
        axes.plot(steps, [record["cpu_s"] for record in found], ".-", label=sweep)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("times the smallest value (4 agents, rank 4, width 768, 12 modules)")
    axes.set_ylabel("aggregator CPU seconds a round")
    axes.set_title("Growth of the aggregator's computations")
    axes.legend()
