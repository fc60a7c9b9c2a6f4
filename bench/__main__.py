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
def parity(
    out: Annotated[Path, typer.Option(help="Folder of records, report and plots.")] = Path("build/parity"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what an earlier run has measured.")] = False,
) -> None:
    """Train by the protocol and by its peers, on the same data, and compare what the agents get."""
    from bench.parity.runner import run  # heavy libraries only for the command that needs them

    run(out, fresh=fresh)


if __name__ == "__main__":
    app(prog_name="python -m bench")
