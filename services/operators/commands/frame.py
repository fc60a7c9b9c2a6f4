"""What all commands share: options, output, errors as exit codes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import typer
from rich.console import Console, RenderableType
from rich.text import Text

from services.common.clock import SystemClock
from services.common.grpc_errors import translate
from services.common.logs import configure_logs
from services.operators.profile import DEFAULT_PROFILE, PROFILE_VARIABLE, OperatorProfile, load_profile
from services.operators.render import as_json
from services.operators.session import Session, connect
from shelora.errors import FederationEnded, SheLoraError, Unavailable

EXIT_OK: Final = 0
EXIT_REFUSED: Final = 1
EXIT_USAGE: Final = 2
EXIT_UNREACHABLE: Final = 3
EXIT_STOPPED: Final = 4
EXIT_CODES: Final = (
    "Exit codes: 0 done, 1 refused or failed, 2 wrong usage or profile, 3 a service cannot be reached, "
    "4 the federation is over or was stopped."
)

_PIPE_WIDTH_CHARACTERS: Final = 200

T = TypeVar("T")

ProfileOption = Annotated[
    Path | None,
    typer.Option(
        "--profile",
        metavar="FILE",
        help=f"Operator profile (YAML); default: ${PROFILE_VARIABLE}, else {DEFAULT_PROFILE}.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@dataclass
class Frame:
    """Options given before the command; the same options after it win."""

    profile: Path | None = None
    json: bool = False


def make_group(name: str, text: str) -> typer.Typer:
    """A group of commands."""
    return typer.Typer(name=name, help=text, epilog=EXIT_CODES, no_args_is_help=True, add_completion=False)


def out() -> Console:
    """Standard output; wide when it is no terminal, so that nothing is cut in a pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=_PIPE_WIDTH_CHARACTERS)


def wants_json(context: typer.Context, given: bool) -> bool:
    """Whether to print JSON."""
    return given or _frame(context).json


def read_profile(context: typer.Context, given: Path | None) -> OperatorProfile:
    """The profile that the options or the environment name; a wrong one is wrong usage."""
    variable = os.environ.get(PROFILE_VARIABLE)
    path = given or _frame(context).profile or (Path(variable) if variable else DEFAULT_PROFILE)
    try:
        return load_profile(path)
    except SheLoraError as error:
        raise typer.BadParameter(str(error), param_hint="--profile") from error


def perform(context: typer.Context, profile: Path | None, json: bool, action: Callable[[Session], Awaitable[T]]) -> T:
    """Connect, act, and turn errors into one clear line and an exit code."""
    found = read_profile(context, profile)

    async def act() -> T:
        async with connect(found, SystemClock()) as session:
            return await action(session)

    return guarded(lambda: asyncio.run(act()), wants_json(context, json))


def guarded(work: Callable[[], T], json: bool) -> T:
    """Run; errors of the tree are shown on standard error and end the command with their exit code."""
    configure_logs("shelora", level="warning")
    try:
        return work()
    except Exception as error:
        known = translate(error)
        if known is None:
            raise
        show_error(known, json)
        raise typer.Exit(exit_code(known)) from error


def exit_code(error: SheLoraError) -> int:
    """The exit code of an error."""
    if isinstance(error, FederationEnded):
        return EXIT_STOPPED
    return EXIT_UNREACHABLE if isinstance(error, Unavailable) else EXIT_REFUSED


def show_error(error: SheLoraError, json: bool) -> None:
    """Say what happened and what to do next, on standard error."""
    console = Console(stderr=True, soft_wrap=True)
    if json:
        fields = {"code": error.code, "message": error.message, "hint": error.hint, "retryable": error.retryable}
        console.out(as_json({"error": fields | {"context": error.context}}), highlight=False)
        return
    console.print(Text.assemble((error.code, "bold red"), f": {error.message}"))
    if error.hint:
        console.print(Text(f"  what to do: {error.hint}"))


def show(value: Any, rendered: RenderableType, json: bool) -> None:
    """Print a value as JSON, or as it was rendered."""
    console = out()
    if json:
        console.out(as_json(value), highlight=False)
    else:
        console.print(rendered)


def _frame(context: typer.Context) -> Frame:
    return context.obj if isinstance(context.obj, Frame) else Frame()
