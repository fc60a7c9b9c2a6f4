"""What a demonstration says: tables and sentences on a console."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Final

from rich.console import Console
from rich.text import Text

from services.operators.demo.folder import DemoFolder
from services.operators.demo.options import DemoOptions
from services.operators.demo.processes import Crew
from services.operators.demo.shares import Shares
from services.operators.demo.split import HELD_OUT
from services.operators.demo.stage import MOST_TEST_ROWS
from services.operators.demo.verify import Verification
from services.operators.plan_tables import STYLES
from services.operators.planning import Explanation
from services.operators.render import percent
from services.operators.sheet import Sheet
from shelora.errors import SheLoraError

_SHOWN_LABELS: Final = 12
_LOG_FIELDS: Final = ("timestamp", "level", "event")


def tell_start(console: Console, options: DemoOptions, folder: DemoFolder, shares: Shares) -> None:
    """What will run, and who has which data."""
    console.print(
        Text(
            f"SHE-LoRA on this machine: key manager, aggregator and {options.agents} agents, {options.rounds} rounds, "
            f"model {options.model}; everything is written to {folder.root}"
        )
    )
    source = options.test or f"{HELD_OUT:.0%} of it, held out"
    limited = f", {MOST_TEST_ROWS:,} of them used" if len(shares.test) > MOST_TEST_ROWS else ""
    labels = shares.labels[:_SHOWN_LABELS]
    title = f"who has what of {options.data} (tested on {source}: {len(shares.test):,} rows{limited})"
    table = Sheet("agent", "rank>", "budget", "rows>", *(f"{label}>" for label in labels), title=title)
    for name, rank, budget in zip(options.names, options.ranks, options.budgets, strict=True):
        counts = shares.counts(name)
        cells = [str(counts[label]) for label in labels]
        table.add(name, str(rank), budget, f"{sum(counts.values()):,}", *cells)
    console.print(table)


def safety_line(found: Explanation) -> Text:
    """What the plan gives away, and why it runs all the same."""
    if not found.unsafe:
        return Text.assemble(
            "leakage: ", (found.level.value, STYLES[found.level]), ", by the attacks of docs/privacy.md"
        )
    return Text.assemble(
        "leakage: ",
        ("unsafe", "bold red"),
        f" for {', '.join(found.unsafe)}, whose budgets leave columns plain: allowed here (--allow-unsafe) to show "
        "unequal budgets; reasons: shelora audit",
    )


def tell_verification(console: Console, verification: Verification) -> None:
    """The check of each round, and the verdict."""
    table = Sheet(
        "round>", "counted>", "agents compared>", "averaged values>", "largest error>", "where",
        title="verification: decrypted averages against float64 averages of the clear factors",
    )  # fmt: skip
    for check in verification.rounds:
        table.add(
            str(check.round),
            str(len(check.counted)),
            str(len(check.opened_by)),
            f"{check.values:,}",
            f"{check.max_abs_error:.2e}",
            check.worst,
        )
    console.print(table)
    verdict, style = ("PASSED", "bold green") if verification.passed else ("FAILED", "bold red")
    console.print(
        Text.assemble(
            (verdict, style),
            f": max_abs_error {verification.max_abs_error:.2e} over {verification.values:,} averaged values "
            f"({verification.comparisons:,} comparisons), bound {verification.bound:.2g}",
        )
    )


def tell_bytes(console: Console, ratios: Sequence[float]) -> None:
    """How far measured bytes are from the formulas."""
    if ratios:
        console.print(
            Text(
                f"payload bytes, measured over the formulas of docs/method.md: {min(ratios):.4f} to {max(ratios):.4f} "
                f"({len(ratios)} figures)"
            )
        )


def tell_accuracy(
    console: Console, names: Sequence[str], before: Mapping[str, float | None], after: Mapping[str, float | None]
) -> None:
    """Accuracy of every agent's adapter at the start and at the end."""
    table = Sheet("agent", "start>", "final>", title="accuracy on the test data, at the start and after the last round")
    for name in names:
        table.add(name, percent(before[name]), percent(after[name]))
    console.print(table)


def tell_end(console: Console, folder: DemoFolder, adapters: Mapping[str, str], classes: int, total_s: float) -> None:
    """Where everything is, and what to do next."""
    console.print(Text(f"\ndone in {total_s:.0f} s; report: {folder.report}"), soft_wrap=True)
    for name, path in adapters.items():
        console.print(Text(f"adapter of {name}: {path}"), soft_wrap=True)
    first = next(iter(adapters.values()))
    loader = "from peft import AutoPeftModelForSequenceClassification as M; "
    loader += f"print(M.from_pretrained({first!r}, num_labels={classes}))"
    programs = sys.prefix
    console.print(Text("\nwhat to do next:"))
    for purpose, command in (
        ("load an adapter with PEFT", f'{programs}/bin/python -c "{loader}"'),
        ("run it on your own labelled text", "make demo DATA=mine.jsonl TEST=mine-test.jsonl"),
        (
            "watch a running demo from another terminal",
            f"{programs}/bin/shelora federation status --watch --profile {folder.profile}",
        ),
    ):
        console.print(Text(f"  {purpose}:\n    {command}"), soft_wrap=True)


def tell_failure(console: Console, error: SheLoraError, crew: Crew | None) -> None:
    """What went wrong, with the end of the log of the process that failed."""
    console.print(Text.assemble((error.code, "bold red"), f": {error.message}"), soft_wrap=True)
    if error.hint:
        console.print(Text(f"  what to do: {error.hint}"), soft_wrap=True)
    worker = crew.workers.get(error.context.get("worker", "")) if crew else None
    if worker is not None:
        console.print(Text(f"  last lines of {worker.log}:"), soft_wrap=True)
        for line in worker.last_lines():
            console.print(Text(f"  | {readable(line)}"), soft_wrap=True)


def readable(line: str) -> str:
    """A JSON log line as a person reads it; anything else as it is."""
    try:
        fields = json.loads(line)
        head = [str(fields.pop(key)) for key in _LOG_FIELDS if key in fields]
        trace = fields.pop("exception", "")
        rest = [f"{key}={value}" for key, value in sorted(fields.items())]
    except (ValueError, TypeError, AttributeError):
        return line
    return " ".join((*head, *rest)) + (f"\n{trace}" if trace else "")
