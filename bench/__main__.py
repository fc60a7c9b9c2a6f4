"""`python -m bench`: measurements of the system, one command each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(name="bench", help="Measure the system.", no_args_is_help=True, add_completion=False)


@app.callback()
def common() -> None:
    """Keep every measurement a command of its own."""


@app.command()
def audit(
    out: Annotated[Path, typer.Option(help="Folder of records, report and plots.")] = Path("build/audit"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what an earlier run has measured.")] = False,
    publish: Annotated[
        bool, typer.Option("--publish", help="Also rewrite docs/privacy.md and the table behind `shelora audit`.")
    ] = False,
) -> None:
    """Attack what the aggregator sees and report what came back."""
    from bench.audit.runner import run  # heavy libraries only for the command that needs them

    run(out, fresh=fresh, publish=publish)


@app.command()
def speed(
    out: Annotated[Path, typer.Option(help="Folder of records, report and plots.")] = Path("build/bench/speed"),
    only: Annotated[str | None, typer.Option(help="Measure only parts whose name contains this; no report.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what an earlier run has measured.")] = False,
    publish: Annotated[
        bool, typer.Option("--publish", help="Also rewrite docs/benchmarks.md, its plots and the README's table.")
    ] = False,
) -> None:
    """Seconds, bytes, memory: the published workload beside its re-created procedure, the price of privacy, growth."""
    from bench.speed.runner import run  # heavy libraries only for the command that needs them

    run(out, fresh=fresh, publish=publish, only=only)


@app.command()
def parity(
    out: Annotated[Path, typer.Option(help="Folder of records, report and plots.")] = Path("build/bench/parity"),
    seeds: Annotated[int, typer.Option(min=1, help="Repeat everything with so many seeds.")] = 3,
    only: Annotated[
        str | None,
        typer.Option(
            help='Measure only units whose name contains this; report only complete studies ("routing", "onesided").'
        ),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what an earlier run has measured.")] = False,
    publish: Annotated[
        bool, typer.Option("--publish", help="Also rewrite the accuracy part of docs/benchmarks.md and its plots.")
    ] = False,
) -> None:
    """Train with the protocol and with other ways to average, and compare the accuracies."""
    from bench.parity.runner import run  # heavy libraries only for the command that needs them
    from bench.parity.setting import Setting

    run(out, fresh=fresh, publish=publish, setting=Setting(seeds=tuple(range(seeds))), only=only)


@app.command()
def aggregator(
    out: Annotated[Path, typer.Option(help="Folder of records and report.")] = Path("build/bench/aggregator"),
    only: Annotated[str | None, typer.Option(help="Measure only parts whose name contains this; no report.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what an earlier run has measured.")] = False,
    publish: Annotated[bool, typer.Option("--publish", help="Also rewrite the tables in docs/benchmarks.md.")] = False,
) -> None:
    """Residue sums against a memory copy, ingest against a bare gRPC stream, memory against the number of agents."""
    from bench.aggregator.runner import run  # heavy libraries only for the command that needs them

    run(out, fresh=fresh, publish=publish, only=only)


if __name__ == "__main__":
    app(prog_name="python -m bench")
