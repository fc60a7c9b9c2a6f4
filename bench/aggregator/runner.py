"""Measures, writes the report and, when asked, the published tables."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Final

from rich.console import Console

from bench import pages
from bench.aggregator import report
from bench.aggregator.scenarios import units
from bench.runner import measure
from bench.sources import ROOT, fingerprint
from services.common.files import write_atomically

PAGE: Final = ROOT / "docs" / "benchmarks.md"
PREFIX: Final = "aggregator_"

_PACKAGES: Final = ("bench/aggregator", "services/aggregator", "services/common", "shelora/he")


def run(out: Path, *, fresh: bool, publish: bool, only: str | None = None) -> None:
    """Measure every part that has no records yet, then write the report and, when asked, docs/benchmarks.md."""
    console = Console()
    sources = [path for package in _PACKAGES for path in sorted((ROOT / package).glob("*.py"))]
    stamp = {"version": fingerprint(sources)}
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="work-", dir=out.absolute()) as folder:
        chosen = {name: unit for name, unit in units(Path(folder)).items() if only is None or only in name}
        result = measure("aggregator", chosen, out, stamp=stamp, fresh=fresh, console=console)
    if only is not None:
        return
    write_atomically(out / "report.md", report.render(result).encode())
    console.print(f"report: {out / 'report.md'}", highlight=False)
    if publish:
        found = {PREFIX + name: text for name, text in report.sections(result).items()}
        write_atomically(PAGE, pages.fill(PAGE.read_text(encoding="utf-8"), found, PREFIX).encode())
        console.print(f"published: {PAGE}", highlight=False)
