"""Runs all parts and writes the report; publishes it into the documentation on request."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from bench.pages import fill
from bench.plots import draw_all
from bench.runner import Unit, measure
from bench.sources import ROOT, fingerprint
from bench.speed import plots, report, scenarios
from bench.speed.load import Workload, read_scale, read_workload
from services.common.files import write_atomically
from services.common.logs import configure_logs

PAGE: Final = ROOT / "docs" / "benchmarks.md"
README: Final = ROOT / "README.md"
_HERE: Final = Path(__file__).parent
_PREFIX: Final = "speed_"


def run(out: Path, *, fresh: bool, publish: bool, only: str | None = None) -> None:
    """Measure every part that has no records yet, then write report, plots and, when asked, the published pages.

    Args:
        out: folder of records, report and plots.
        fresh: measure again what an earlier run has measured.
        publish: also rewrite docs/benchmarks.md, its plots, and the README's table.
        only: measure parts whose name contains this and report nothing.
    """
    console = Console()
    configure_logs("bench", level="error")
    workload = read_workload(_HERE / "published.json")
    chosen = {name: unit for name, unit in _units(workload, out / "work").items() if not only or only in name}
    stamp = {"version": fingerprint(_decisive())}
    result = measure("speed", chosen, out, stamp=stamp, fresh=fresh, console=console)
    if only:
        console.print(f"measured: {', '.join(chosen)}; figures: {out / 'speed.json'}", highlight=False)
        return
    write_atomically(out / "report.md", report.render(result, workload).encode())
    drawn = draw_all(plots.draws(result["records"], workload), out)
    console.print(f"report: {out / 'report.md'}, {len(drawn)} plots, figures: {out / 'speed.json'}", highlight=False)
    if publish:
        for path in _publish(result, workload):
            console.print(f"published: {path}", highlight=False)


def _units(workload: Workload, work: Path) -> dict[str, Unit]:
    scaled = read_scale(_HERE / "scale.json")
    units: dict[str, Unit] = {"baseline": partial(scenarios.baseline, workload)}
    units |= {name: partial(scenarios.published, name, run, work) for name, run in workload.runs.items()}
    units["vectors"] = partial(scenarios.vectors, next(iter(workload.runs.values())))
    units |= {"price": partial(scenarios.price, work), "training": partial(scenarios.training, work)}
    return units | {f"scale {sweep}": partial(scenarios.scale, sweep, scaled, work) for sweep in scaled.sweeps}


def _publish(result: Mapping[str, Any], workload: Workload) -> list[Path]:
    generated = {f"{_PREFIX}{name}": text for name, text in report.sections(result, workload).items()}
    write_atomically(PAGE, fill(PAGE.read_text(encoding="utf-8"), generated, _PREFIX).encode())
    table = {"speed_headline": report.headline(result["records"], workload)}
    write_atomically(README, fill(README.read_text(encoding="utf-8"), table, _PREFIX).encode())
    drawn = draw_all(plots.draws(result["records"], workload), PAGE.parent / "plots", suffixes=("svg",))
    return [PAGE, README, *drawn]


def _decisive() -> list[Path]:
    """All of the product, and how it is measured; not how it is told."""
    told = {"report.py", "plots.py", "runner.py"}
    here = [path for path in sorted(_HERE.iterdir()) if path.suffix in (".py", ".json") and path.name not in told]
    product = sorted(path for folder in ("shelora", "services") for path in (ROOT / folder).rglob("*.py"))
    return [*here, *product]
