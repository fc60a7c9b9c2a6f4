"""`shelora`: the command line of those who run a federation."""

from __future__ import annotations

from typing import Annotated

import typer

from services.operators.commands import agents, audits, federations, keys, plans
from services.operators.commands.frame import EXIT_CODES, Frame, JsonOption, ProfileOption, out
from shelora import __version__

app = typer.Typer(
    name="shelora",
    help="Run a federation: encrypted averages of LoRA adapters.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
)
app.add_typer(federations.app)
app.add_typer(agents.app)
app.add_typer(keys.app)
app.add_typer(plans.app)
app.command(epilog=EXIT_CODES)(audits.audit)


def _show_version(wanted: bool) -> None:
    if wanted:
        out().out(f"shelora {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def common(
    context: typer.Context,
    profile: ProfileOption = None,
    json: JsonOption = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Take the options that may also stand after the command."""
    context.obj = Frame(profile, json)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def demo(context: typer.Context) -> None:
    """Run the whole system on this machine with real training and real encryption (shelora demo --help)."""
    from services.operators.demo.__main__ import app as demonstration  # only the demo needs these libraries

    demonstration(args=context.args, prog_name="shelora demo")


def main() -> None:
    """Entry point of `shelora`."""
    app()


if __name__ == "__main__":
    main()
