"""Runs the scenarios, keeps what each has measured, writes the report."""

from __future__ import annotations

import ast
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from bench.audit import plots, publication, report, scenarios, secrecy
from bench.audit.corpus import load_corpus
from bench.audit.scenarios import Record, Setting
from bench.audit.victim import count_tokens
from services.common.files import write_atomically
from shelora import __version__

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
_TRAINER: Final = _SOURCES.parents[1] / "services" / "client_agent"


def run(out: Path, *, fresh: bool, publish: bool) -> None:
    """Measure every scenario that has no records yet, then write report, plots and, when asked, the published table."""
    console = Console()
    corpus = load_corpus(count_tokens)
    stamp = {"version": _fingerprint(), "corpus": corpus.name, "texts": len(corpus.rows)}
    found: dict[str, list[Record]] = {}
    seconds: dict[str, float] = {}
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[detail]}"),
                  TimeElapsedColumn(), console=console) as progress:  # fmt: skip
        total = progress.add_task("audit", total=len(SCENARIOS), detail="")
        for name, scenario in SCENARIOS.items():
            path = out / "records" / f"{name}.json"
            kept = None if fresh else _kept(path, stamp)
            if kept is None:
                started, records = time.perf_counter(), []
                for record in scenario(Setting(corpus, out / "work")):
                    records.append(record)
                    progress.update(total, description=name, detail=f"{len(records)} figures")
                kept = {"stamp": stamp, "seconds": time.perf_counter() - started, "records": records}
                write_atomically(path, json.dumps(kept, indent=1).encode())
            found[name], seconds[name] = kept["records"], kept["seconds"]
            progress.advance(total)
    result = {"machine": _machine(), "stamp": stamp, "seconds": seconds, "records": found}
    write_atomically(out / "audit.json", json.dumps(result, indent=1).encode())
    write_atomically(out / "report.md", report.render(result).encode())
    drawn = plots.draw(found, out)
    console.print(f"report: {out / 'report.md'}, {len(drawn)} plots, figures: {out / 'audit.json'}", highlight=False)
    if publish:
        for path in publication.publish(result):
            console.print(f"published: {path}", highlight=False)


def _kept(path: Path, stamp: Mapping[str, Any]) -> dict[str, Any] | None:
    """Records of an earlier run of the same code on the same texts."""
    if not path.exists():
        return None
    kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return kept if kept.get("stamp") == stamp else None


def _fingerprint() -> str:
    """Of everything that decides the figures: the attacks, and the agent's code that they look at."""
    digest = sha256(__version__.encode())
    names = ("attacks", "corpus", "decoders", "orders", "probe", "scenarios", "scores", "secrecy", "victim", "wire")
    sources = [_SOURCES / f"{name}.py" for name in names]
    sources += [_TRAINER / "round.py", *sorted((_TRAINER / "training").glob("*.py"))]
    for path in sources:
        digest.update(_code(path).encode())
    return digest.hexdigest()[:16]


def _code(path: Path) -> str:
    """A module without comments, layout and docstrings, none of which decide a figure."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            node.value.value = ""
    return ast.dump(tree)


def _machine() -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
    }
