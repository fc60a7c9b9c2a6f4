"""What is measured: each function is one resumable part and yields flat records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from bench.records import Record
from bench.speed.baseline import measure_baseline, scale_baseline
from bench.speed.computing import measure_computing
from bench.speed.federation import Measured, given_options, measure_federation
from bench.speed.load import Run, Scale, Workload
from bench.speed.vectors import measure_vectors
from services.operators.demo.options import choose
from services.operators.planning import Terms, explain, imagine
from shelora.plan import Packing

PRICE_RUN: Final = Run(agents=4, modules=19, out_features=384, in_features=384, ranks=(8,), budgets=("full",), rounds=8)
"""The adapters of the demonstration's model at rank 8, every agent alike."""

PRICES: Final[tuple[tuple[str, str, Packing], ...]] = (
    ("nothing encrypted", "0%", Packing.EXACT),
    ("5 %", "5%", Packing.EXACT),
    ("25 %", "25%", Packing.EXACT),
    ("full, dense", "full", Packing.DENSE),
    ("full, exact", "full", Packing.EXACT),
)
TRAINED_ROUNDS: Final = 3
_LAYERS: Final = 8
_REPEATS: Final = 3


def baseline(workload: Workload) -> Iterator[Record]:
    """The published procedure, re-created, on a few pairs; scaled to every run of the workload."""
    first = next(iter(workload.runs.values()))
    measured = measure_baseline(first, workload.pairs, workload.columns)
    yield {"part": "pair", **measured}
    for name, run in workload.runs.items():
        if run.packing is Packing.EXACT:
            yield {"part": "workload", "run": name, "budget": run.budget(0), **scale_baseline(measured, run)}


def published(name: str, run: Run, folder: Path) -> Iterator[Record]:
    """One run of the published workload: measured rounds, then a verified one."""
    common = {"run": name, "budget": run.budget(0), "packing": run.packing.value}
    yield from federation_records(measure_federation(given_options(run, folder), run), common)
    checked = measure_federation(given_options(replace(run, rounds=1), folder), replace(run, rounds=1), reveal=True)
    if checked.check is not None:
        yield common | {"part": "error", "max_abs_error": checked.check.max_abs_error, "values": checked.check.values}


def vectors(run: Run) -> Iterator[Record]:
    """The same vectors through both libraries."""
    yield from measure_vectors(run, _LAYERS, _REPEATS)


def price(folder: Path) -> Iterator[Record]:
    """Rounds without training: plaintext averaging, then budgets, all with given updates of the same sizes."""
    measured = measure_federation(given_options(PRICE_RUN, folder), PRICE_RUN, plain=True)
    yield from federation_records(measured, {"method": "plaintext"})
    for method, budget, packing in PRICES:
        run = replace(PRICE_RUN, budgets=(budget,), packing=packing)
        yield from federation_records(measure_federation(given_options(run, folder), run), {"method": method})


def training(folder: Path) -> Iterator[Record]:
    """Rounds with the demonstration's training on the demonstration's data, in the clear and fully encrypted."""
    options = choose(
        data=None,
        test=None,
        model="embedded",
        agents=4,
        rounds=TRAINED_ROUNDS,
        ranks="8",
        budgets="full",
        compare=None,
        out=folder,
    )
    yield from federation_records(measure_federation(options, plain=True), {"method": "plaintext"})
    for packing in (Packing.DENSE, Packing.EXACT):
        measured = measure_federation(replace(options, packing=packing))
        yield from federation_records(measured, {"method": f"full, {packing.value}"})


def scale(sweep: str, scaled: Scale, folder: Path) -> Iterator[Record]:
    """The aggregator's computations of a round along one axis."""
    for value in scaled.sweeps[sweep]:
        run = scaled.at(sweep, value)
        yield {"sweep": sweep, "value": value, **measure_computing(run, folder), **_predicted(run)}


def _predicted(run: Run) -> Record:
    """What the planner says of the same round before it happens."""
    ranks = [run.rank(index) for index in range(run.agents)]
    participants = imagine(run.shapes, ranks, run.budgets)
    told = explain(run.shapes, participants, Terms(cap=run.cap, packing=run.packing)).aggregator
    return {
        "predicted_cpu_s": told.basis_s + told.projection_s + told.average_s + told.sum_s,
        "predicted_ram_bytes": told.peak_ram_bytes + told.notes_bytes,
    }


def federation_records(measured: Measured, common: Mapping[str, Any]) -> Iterator[Record]:
    """One record a round, one for the whole."""
    numbers = sorted(int(number) for number in next(iter(measured.marks.values()))["applied_s"])
    phases = {found.number: found.phase_seconds for found in measured.rounds}
    for number in numbers:
        yield {
            **common,
            "part": "round",
            "round": number,
            "seconds": measured.round_seconds(number),
            **{f"phase_{phase}_s": seconds for phase, seconds in phases.get(number, {}).items()},
            **_agent_figures(measured, number),
        }
    yield {
        **common,
        "part": "use",
        "rounds": len(numbers),
        "server_cpu_s": measured.server.cpu_s / len(numbers),
        "server_idle_bytes": measured.server.idle_bytes,
        "server_peak_bytes": measured.server.peak_bytes,
        "agent_peak_bytes": max(mark["peak_rss_bytes"] for mark in measured.marks.values()),
        "agent_cpu_s": max(mark["cpu_s"] for mark in measured.marks.values()),
    }


def _agent_figures(measured: Measured, number: int) -> Record:
    """Largest over the agents."""
    found = [mark["figures"][str(number)] for mark in measured.marks.values()]
    names = {name for figures in found for name in figures if "bytes" in name or "seconds" in name}
    return {name: max(figures.get(name, 0.0) for figures in found) for name in sorted(names)}
