"""`make demo`, or `python -m services.operators.demo`."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.text import Text

from services.common.clock import SystemClock
from services.common.grpc_errors import translate
from services.common.logs import configure_logs
from services.operators.demo.folder import take_folder
from services.operators.demo.narration import tell_failure
from services.operators.demo.options import (
    DEFAULT_BUDGETS,
    DEFAULT_OUT,
    DEFAULT_RANKS,
    DEFAULT_ROUNDS,
    EMBEDDED,
    DemoOptions,
    choose,
)
from services.operators.demo.performance import Performance
from shelora.errors import InvalidConfiguration, MalformedInput, SheLoraError
from shelora.plan import Packing

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_SIGNAL: Final = 128

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PIPE_WIDTH_CHARACTERS: Final = 180
_GRACE_S: Final = 3.0
"""Nothing that the processes hold is needed once the demonstration is over."""

app = typer.Typer(add_completion=False)


@app.command(
    epilog="Exit codes: 0 verified, 1 failed or not verified, 2 wrong usage or unusable data, 130 interrupted.",
)
def demo(
    data: Annotated[
        Path | None, typer.Option(help="Labelled text: JSONL, CSV, TSV or Parquet. Default: the example.")
    ] = None,
    test: Annotated[Path | None, typer.Option(help="Test text; without it a fifth of the data is held out.")] = None,
    model: Annotated[str, typer.Option(help='"embedded", a folder, or a hub id of an encoder.')] = EMBEDDED,
    agents: Annotated[int | None, typer.Option(help="Number of agents.", show_default="4")] = None,
    rounds: Annotated[int, typer.Option(help="Number of rounds.")] = DEFAULT_ROUNDS,
    ranks: Annotated[str, typer.Option(help="LoRA ranks, repeated over the agents.")] = DEFAULT_RANKS,
    budgets: Annotated[str, typer.Option(help="Encryption budgets, repeated over the agents.")] = DEFAULT_BUDGETS,
    compare: Annotated[
        str | None, typer.Option(metavar="plaintext", help="Also train with plaintext averaging and show both.")
    ] = None,
    packing: Annotated[
        Packing, typer.Option(help="How ciphertexts are packed; dense halves them, with an error of about 1e-4.")
    ] = Packing.EXACT,
    out: Annotated[
        Path, typer.Option(help="Folder to write; one of an earlier demonstration is replaced.")
    ] = DEFAULT_OUT,
    text_field: Annotated[str, typer.Option(help="Field with the text.")] = "text",
    label_field: Annotated[str, typer.Option(help="Field with the label.")] = "label",
    concentration: Annotated[
        float, typer.Option(help="How even the split is: 0.1 very skewed, 2 mild, 100 nearly even.")
    ] = 2.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the split and the training.")] = 7,
) -> None:
    """Run key manager, aggregator and unequal agents on this machine: real training and encryption, then the proof."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_PIPE_WIDTH_CHARACTERS)
    configure_logs("demo", level="error")
    try:
        options = choose(
            data=data,
            test=test,
            model=model,
            agents=agents,
            rounds=rounds,
            ranks=ranks,
            budgets=budgets,
            compare=compare,
            out=out,
            text_field=text_field,
            label_field=label_field,
            concentration=concentration,
            seed=seed,
            packing=packing,
        )
        code = asyncio.run(perform(options, console))
    except SheLoraError as error:
        tell_failure(console, error, None)
        code = EXIT_USAGE if isinstance(error, InvalidConfiguration) else EXIT_FAILED
    raise typer.Exit(code)


async def perform(options: DemoOptions, console: Console) -> int:
    """Run a demonstration; whatever happens, no process is left when this returns.

    Returns:
        The exit code.

    Raises:
        SheLoraError: the folder cannot be used.
    """
    with take_folder(options.out) as folder:
        performance = Performance(options, folder, console, SystemClock())
        task = asyncio.ensure_future(performance.run())
        interrupted = Interruption(task, performance)
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, interrupted.signalled, number)
        try:
            return 0 if await task else EXIT_FAILED
        except asyncio.CancelledError:
            console.print(Text("\ninterrupted; ending all processes", style="yellow"))
            return EXIT_SIGNAL + interrupted.number
        except Exception as error:
            known = translate(error)
            if known is None:
                raise
            tell_failure(console, known, performance.crew)
            return EXIT_USAGE if isinstance(known, MalformedInput) else EXIT_FAILED
        finally:
            interrupted.ending = True
            await performance.crew.stop(grace_s=_GRACE_S)
            for number in _SIGNALS:
                loop.remove_signal_handler(number)


class Interruption:
    """What signals do: the first one ends the demonstration in order, the next one at once."""

    def __init__(self, task: asyncio.Future[bool], performance: Performance) -> None:
        self._task = task
        self._performance = performance
        self.number = 0
        self.ending = False

    def signalled(self, number: signal.Signals) -> None:
        """Cancel the run; while it already ends, kill what still runs."""
        if self.number or self.ending:
            self._performance.crew.kill()
            return
        self.number = int(number)
        self._task.cancel()


if __name__ == "__main__":
    app(prog_name="python -m services.operators.demo")
