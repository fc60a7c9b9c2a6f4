"""Runs the scenarios of the audit and writes its report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Final

from rich.console import Console

from bench.audit import plots, publication, report, scenarios, secrecy
from bench.audit.corpus import load_corpus
from bench.audit.scenarios import Setting
from bench.audit.victim import count_tokens
from bench.plots import draw_all
from bench.records import Record
from bench.runner import measure
from bench.sources import ROOT, fingerprint
from services.common.files import write_atomically

Scenario = Callable[[Setting], Iterator[Record]]

SCENARIOS: Final[Mapping[str, Scenario]] = {
    "budgets": scenarios.budgets,
    "batches": scenarios.batches,
    "trainings": scenarios.trainings,
    "defaults": scenarios.defaults,
    "orders": secrecy.orders,
    "decoders": secrecy.decoder_models,
    "membership": secrecy.membership,
}

_SOURCES: Final = Path(__file__).parent
_TRAINER: Final = ROOT / "services" / "client_agent"


def run(out: Path, *, fresh: bool, publish: bool) -> None:
    """Measure every scenario that has no records yet, then write report, plots and, when asked, the published table."""
    console = Console()
    corpus = load_corpus(count_tokens)
    stamp = {"version": fingerprint(_decisive()), "corpus": corpus.name, "texts": len(corpus.rows)}
    units = {name: partial(scenario, Setting(corpus, out / "work")) for name, scenario in SCENARIOS.items()}
    result = measure("audit", units, out, stamp=stamp, fresh=fresh, console=console)
    write_atomically(out / "report.md", report.render(result).encode())
    drawn = draw_all(plots.draws(result["records"]), out)
    console.print(f"report: {out / 'report.md'}, {len(drawn)} plots, figures: {out / 'audit.json'}", highlight=False)
    if publish:
        for path in publication.publish(result):
            console.print(f"published: {path}", highlight=False)


def _decisive() -> list[Path]:
    """The attacks, and the agent's code that they look at."""
    names = ("attacks", "corpus", "decoders", "orders", "probe", "scenarios", "scores", "secrecy", "victim", "wire")
    sources = [_SOURCES / f"{name}.py" for name in names]
    return [*sources, _TRAINER / "round.py", *sorted((_TRAINER / "training").glob("*.py"))]
