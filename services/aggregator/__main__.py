"""`shelora-aggregator`: the command line of the aggregator."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.text import Text

from services.aggregator import host
from services.aggregator.config import AggregatorConfig
from services.common.clock import SystemClock
from services.common.config import load_config
from services.common.grpc_errors import translate
from services.common.lifecycle import run_until_signalled
from services.common.logs import configure_logs
from services.common.threads import keep_algebra_on_callers_thread
from shelora.errors import InvalidConfiguration, Unavailable

EXIT_REFUSED: Final = 1
EXIT_USAGE: Final = 2
EXIT_UNREACHABLE: Final = 3
EXIT_CODES: Final = "Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 3 a service cannot be reached."

app = typer.Typer(
    name="shelora-aggregator",
    help="Aggregator: runs the rounds of a federation and averages what it cannot decrypt.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
)

ConfigOption = Annotated[Path, typer.Option("--config", metavar="FILE", help="Configuration, aggregator.yaml.")]


@app.command(epilog=EXIT_CODES)
def serve(
    config: ConfigOption,
    ready_file: Annotated[
        Path | None, typer.Option("--ready-file", metavar="FILE", help="Written with the ports once it serves.")
    ] = None,
) -> None:
    """Serve until SIGTERM: enrols and brings the database up to date first if need be."""

    async def main(loaded: AggregatorConfig, stop: asyncio.Event) -> None:
        await host.serve(loaded, SystemClock(), stop, ready_file)

    keep_algebra_on_callers_thread()
    _run(config, main)


@app.command(epilog=EXIT_CODES)
def migrate(config: ConfigOption) -> None:
    """Bring the database to the newest schema and exit."""

    async def main(loaded: AggregatorConfig, _stop: asyncio.Event) -> None:
        await host.migrate_database(loaded)

    _run(config, main)


def _run(path: Path, main: Callable[[AggregatorConfig, asyncio.Event], Awaitable[None]]) -> None:
    """Load the configuration, run, and turn errors into one clear line and an exit code."""
    try:
        loaded = load_config(AggregatorConfig, path)
        configure_logs("aggregator", level=loaded.log_level)
        run_until_signalled(lambda stop: main(loaded, stop))
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_REFUSED) from None
    except Exception as error:
        known = translate(error)
        if known is None:
            raise
        Console(stderr=True).print(Text(f"{known.code}: {known}"), soft_wrap=True)
        if isinstance(known, InvalidConfiguration):
            raise typer.Exit(EXIT_USAGE) from None
        raise typer.Exit(EXIT_UNREACHABLE if isinstance(known, Unavailable) else EXIT_REFUSED) from None


def main() -> None:
    """Entry point of `shelora-aggregator`."""
    app()


if __name__ == "__main__":
    main()
