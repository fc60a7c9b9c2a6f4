"""`shelora-agent`: run an agent, and talk to a running one through its control socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from services.client_agent.agent import Agent
from services.client_agent.client import ControlClient
from services.client_agent.config import AgentConfig
from services.client_agent.domain import Status
from services.client_agent.serving import serving
from services.common.channel import open_channel
from services.common.config import load_config
from services.common.lifecycle import announced, run_until_signalled
from services.common.logs import configure_logs
from services.common.threads import keep_algebra_on_callers_thread
from shelora.errors import SheLoraError, Unavailable

app = typer.Typer(
    name="shelora-agent",
    help="Client agent: fine-tunes on this device's data and takes part in encrypted averages.",
    no_args_is_help=True,
    add_completion=False,
)
console = Console()
errors = Console(stderr=True)
T = TypeVar("T")

EXIT_REFUSED = 1
EXIT_UNREACHABLE = 3

ConfigOption = Annotated[Path, typer.Option("--config", help="The agent's configuration file.", dir_okay=False)]
ControlOption = Annotated[
    str, typer.Option("--control", help="Control address of the agent, for example unix:/run/agent.sock.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def run(
    config: ConfigOption,
    ready_file: Annotated[Path | None, typer.Option(help="Written once it listens, and says where.")] = None,
    quiet: Annotated[bool, typer.Option(help="No progress bar.")] = False,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Take part in the federation until it is over. Exit codes: 0 finished, 1 refused, 3 unreachable."""
    configure_logs("agent", level=log_level)
    keep_algebra_on_callers_thread()

    async def main(stop: asyncio.Event) -> None:
        loaded = load_config(AgentConfig, config, service="agent")
        agent = Agent(loaded)
        async with serving(agent) as ports:
            show = asyncio.ensure_future(_show_progress(agent)) if console.is_terminal and not quiet else None
            life = asyncio.ensure_future(agent.run())
            stopped = asyncio.ensure_future(stop.wait())
            try:
                with announced(ready_file, ports):
                    await asyncio.wait([life, stopped], return_when=asyncio.FIRST_COMPLETED)
                if life.done():
                    life.result()
            finally:
                for task in (life, stopped, show):
                    if task is not None:
                        task.cancel()
                        await asyncio.gather(task, return_exceptions=True)

    _guarded(lambda: run_until_signalled(main))


@app.command()
def status(control: ControlOption, as_json: JsonOption = False) -> None:
    """Show what the agent is doing."""
    _show_status(_ask(control, lambda agent: agent.status()), as_json)


@app.command()
def start(control: ControlOption, as_json: JsonOption = False) -> None:
    """Go on after a pause."""
    _show_status(_ask(control, lambda agent: agent.start()), as_json)


@app.command()
def pause(control: ControlOption, as_json: JsonOption = False) -> None:
    """Finish the step at hand, then wait for `start`."""
    _show_status(_ask(control, lambda agent: agent.pause()), as_json)


@app.command()
def stop(control: ControlOption, reason: Annotated[str, typer.Option(help="Told to the federation.")] = "") -> None:
    """Leave the running round and end the agent."""
    _ask(control, lambda agent: agent.stop(reason))


@app.command()
def export(
    control: ControlOption,
    folder: Annotated[Path, typer.Argument(help="New or empty folder for the PEFT adapter.")],
    round_number: Annotated[int, typer.Option("--round", help="Round, 0 for the newest.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Copy a saved PEFT adapter."""
    target, number = _ask(control, lambda agent: agent.export_adapter(round_number, folder.absolute()))
    if as_json:
        console.print_json(json.dumps({"folder": str(target), "round": number}))
    else:
        console.print(f"adapter of round {number} in {target}")


@app.command()
def watch(control: ControlOption) -> None:
    """Print one JSON line per change until the agent ends."""

    async def follow(agent: ControlClient) -> None:
        async for seen in agent.watch():
            console.out(json.dumps(asdict(seen)), highlight=False)

    _ask(control, follow)


def _ask(control: str, question: Callable[[ControlClient], Awaitable[T]]) -> T:
    async def ask() -> T:
        async with open_channel(control, None) as channel:
            return await question(ControlClient(channel))

    return _guarded(lambda: asyncio.run(ask()))


def _guarded(work: Callable[[], T]) -> T:
    """Run, and turn errors into one clear line and an exit code."""
    try:
        return work()
    except SheLoraError as error:
        errors.print(f"[bold red]{error.code}[/]: {error.message}", highlight=False)
        if error.hint:
            errors.print(f"  what to do: {error.hint}", highlight=False)
        raise typer.Exit(EXIT_UNREACHABLE if isinstance(error, Unavailable) else EXIT_REFUSED) from error


def _show_status(seen: Status, as_json: bool) -> None:
    if as_json:
        console.print_json(json.dumps(asdict(seen)))
        return
    activity = seen.activity.value + (" (paused)" if seen.paused else "")
    rank = f"{seen.rank} (sends {seen.sent_rank})" if seen.sent_rank > seen.rank else str(seen.rank)
    console.print(f"[bold]{seen.name or '(not enrolled)'}[/] in {seen.federation}: {activity}", highlight=False)
    console.print(
        f"round {seen.round} of {seen.rounds}, applied {seen.applied_round}, rank {rank}, budget {seen.budget}"
    )
    for name, value in sorted(seen.metrics.items()):
        console.print(f"  {name:<24} {value:g}")
    if seen.last_error:
        console.print(f"last error: {seen.last_error}", style="yellow")


async def _show_progress(agent: Agent) -> None:
    columns = (
        TextColumn("[bold]{task.fields[name]}"),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        bar = bars.add_task("preparing", total=1.0, name=agent.config.federation)
        async for status in agent.watch():
            bars.update(bar, completed=status.fraction, description=_line(status), name=status.name or "agent")


def _line(status: Status) -> str:
    where = f"round {status.round}/{status.rounds} " if status.rounds else ""
    return f"{where}{status.activity.value}{': ' + status.detail if status.detail else ''}"


def main() -> None:
    """Entry point of `shelora-agent`."""
    app()


if __name__ == "__main__":
    main()
