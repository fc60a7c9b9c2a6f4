"""Runs the units of the parity measurement and writes its report."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from bench.pages import fill
from bench.parity import plots, report
from bench.parity.corpus import Corpus, load_corpus, read_corpus
from bench.parity.exchange import draw_keys
from bench.parity.lab import Lab
from bench.parity.scenarios import Study, units
from bench.parity.setting import Setting
from bench.parity.studies import ROUTING, SKEW, SideStudy
from bench.plots import draw_all
from bench.runner import Result, Unit, measure
from bench.sources import ROOT, fingerprint
from services.common.files import write_atomically

PAGE: Final = ROOT / "docs" / "benchmarks.md"
MAIN: Final = "parity"
_PREFIX: Final = "parity_"
_SOURCES: Final = Path(__file__).parent
_AGENT: Final = ROOT / "services" / "client_agent"
_MESSAGES: Final = ROOT / "examples" / "data"


def run(
    out: Path, *, fresh: bool, publish: bool = False, setting: Setting | None = None, only: str | None = None
) -> None:
    """Measure every unit that has no records yet, then write report, plots and, when asked, the published page.

    Args:
        out: folder of records, report and plots.
        fresh: measure again what an earlier run has measured.
        publish: also rewrite docs/benchmarks.md and its plots.
        setting: what is trained; the studies beside the main one take its seeds and its training too.
        only: measure units whose name contains this; only a study that was measured whole is reported and published.
    """
    console, chosen = Console(), setting or Setting()
    measured = partial(_measure, only=only or "", fresh=fresh, console=console)
    reviews = load_corpus()

    def beside(side: SideStudy, corpus: Corpus) -> Result | None:
        return measured(side.name, out / side.name, corpus, side.change(chosen), side.units)

    main = measured(MAIN, out, reviews, chosen, units)
    routing = beside(ROUTING, _read_messages())
    skew = {side.title: result for side in SKEW if (result := beside(side, reviews))}
    generated = report.sections(main) if main else {}
    if routing:
        generated["parity_routing"] = report.routing(routing)
    if len(skew) == len(SKEW):
        generated["parity_skew"] = report.skew(skew)
    draws = plots.draws(main["records"]) if main else {}
    if routing:
        draws |= plots.routing_draws(routing["records"])
    if generated:
        write_atomically(out / "report.md", report.render(generated).encode())
        drawn = draw_all(draws, out)
        console.print(f"report: {out / 'report.md'}, {len(drawn)} plots", highlight=False)
    if generated and publish:
        page = PAGE.read_text(encoding="utf-8")
        if main:
            page = fill(page, generated, _PREFIX)
        else:
            for name, text in generated.items():
                page = fill(page, {name: text}, name)
        write_atomically(PAGE, page.encode())
        draw_all(draws, PAGE.parent / "plots", suffixes=("svg",))
        console.print(f"published: {PAGE}", highlight=False)


def _measure(
    name: str,
    out: Path,
    corpus: Corpus,
    setting: Setting,
    parts: Callable[[Setting, Callable[[], Study]], Mapping[str, Unit]],
    *,
    only: str,
    fresh: bool,
    console: Console,
) -> Result | None:
    """Measure the units of a study that are asked for; None unless these are all."""
    threads = len(os.sched_getaffinity(0))

    @cache
    def study() -> Study:
        return Study(setting, corpus, out / "work", Lab(corpus, setting, threads), draw_keys(threads))

    # A unit's name holds its seed: a run with more seeds keeps what fewer have measured.
    stamp = {
        "version": fingerprint(_decisive()),
        "corpus": corpus.name,
        "texts": [len(corpus.train), len(corpus.test)],
        "setting": {key: value for key, value in _plain(asdict(setting)).items() if key != "seeds"},
    }
    whole = parts(setting, study)
    chosen = {unit: work for unit, work in whole.items() if only in unit}
    if not chosen:
        return None
    result = measure(name, chosen, out, stamp=stamp, fresh=fresh, console=console)
    return result if chosen == whole else None


def _read_messages() -> Corpus:
    """The demonstration's messages, whether or not there are reviews."""
    read = read_corpus("routing messages", _MESSAGES / "routing_train.jsonl", _MESSAGES / "routing_test.jsonl")
    return replace(read, name=f"routing messages of {len(read.labels)} classes")


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
