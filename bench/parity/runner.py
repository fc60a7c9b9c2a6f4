"""Runs the units of the parity measurement and writes its report."""

from __future__ import annotations

import os
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from bench.pages import fill
from bench.parity import plots, report
from bench.parity.corpus import load_corpus
from bench.parity.exchange import draw_keys
from bench.parity.lab import Lab
from bench.parity.scenarios import Study, units
from bench.parity.setting import Setting
from bench.plots import draw_all
from bench.runner import Result, measure
from bench.sources import ROOT, fingerprint
from services.common.files import write_atomically

PAGE: Final = ROOT / "docs" / "benchmarks.md"
_PREFIX: Final = "parity_"
_SOURCES: Final = Path(__file__).parent
_AGENT: Final = ROOT / "services" / "client_agent"


def run(out: Path, *, fresh: bool, publish: bool = False, setting: Setting | None = None) -> Result:
    """Measure every unit that has no records yet, then write report, plots and, when asked, the published page."""
    console, chosen, corpus = Console(), setting or Setting(), load_corpus()
    threads = len(os.sched_getaffinity(0))

    @cache
    def study() -> Study:
        return Study(chosen, corpus, out / "work", Lab(corpus, chosen, threads), draw_keys(threads))

    # A unit's name holds its seed: a run with more seeds keeps what fewer have measured.
    stamp = {
        "version": fingerprint(_decisive()),
        "corpus": corpus.name,
        "texts": [len(corpus.train), len(corpus.test)],
        "setting": {name: value for name, value in _plain(asdict(chosen)).items() if name != "seeds"},
    }
    result = measure("parity", units(chosen, study), out, stamp=stamp, fresh=fresh, console=console)
    write_atomically(out / "report.md", report.render(result).encode())
    drawn = draw_all(plots.draws(result["records"]), out)
    console.print(f"report: {out / 'report.md'}, {len(drawn)} plots, figures: {out / 'parity.json'}", highlight=False)
    if publish:
        generated = report.sections(result)
        write_atomically(PAGE, fill(PAGE.read_text(encoding="utf-8"), generated, _PREFIX).encode())
        draw_all(plots.draws(result["records"]), PAGE.parent / "plots", suffixes=("svg",))
        console.print(f"published: {PAGE}", highlight=False)
    return result


def _decisive() -> list[Path]:
    """The methods, and the product's code that they are made of."""
    sources = [_SOURCES / f"{name}.py" for name in ("corpus", "exchange", "lab", "methods", "scenarios", "setting")]
    sources += [_AGENT / "round.py", *sorted((_AGENT / "training").glob("*.py"))]
    sources += sorted((ROOT / "shelora" / "lora").glob("*.py"))
    return [*sources, ROOT / "services" / "aggregator" / "compute.py"]


def _plain(value: Any) -> Any:
    """As JSON gives it back, so that stamps can be compared."""
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return {name: _plain(item) for name, item in value.items()} if hasattr(value, "items") else value
