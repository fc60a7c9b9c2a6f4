"""What a running demonstration shows: one line for the federation, one progress bar an agent, elapsed time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from services.common.channel import open_channel
from services.common.clock import Clock
from services.operators.client import AgentControlClient
from services.operators.demo.processes import Crew, describe_exit, failure
from services.operators.demo.stage import AGGREGATOR, FEDERATION, KEYMANAGER
from services.operators.domain import AgentProgress, Federation, RegisteredAgent, Round
from services.operators.session import Session
from shelora.errors import FederationEnded, SheLoraError
from shelora.rounds.phases import FederationState, RoundPhase

_POLL_S: Final = 0.5
_BAR_CHARACTERS: Final = 24
_REFRESHES_PER_S: Final = 8


@dataclass
class Board:
    """The present state of everything, as far as it is known."""

    agents: Mapping[str, str]
    """Name to a description, for example "rank 8, 25%"."""
    started_s: float
    step: str = "starting"
    federation: Federation | None = None
    progress: dict[str, AgentProgress] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)

    def headline(self) -> str:
        """The federation in one line."""
        if self.federation is None:
            return self.step
        found, federation = self.federation.round, self.federation
        if federation.state is not FederationState.RUNNING or found is None:
            return f"{federation.state.value}, {federation.agents} of {federation.spec.target_agents} agents registered"
        phase = found.phase.value if found.phase else "-"
        parts = [f"round {found.number} of {federation.spec.rounds}", phase]
        if found.phase in (RoundPhase.TRAIN, RoundPhase.FACTORS):
            parts.append(f"factors of {found.size} of {federation.spec.target_agents} agents")
        elif found.phase is RoundPhase.CIPHER:
            parts.append(f"ciphertexts of {found.complete} of {found.size} agents")
        return ", ".join(parts)

    def activity(self, name: str) -> str:
        """What an agent does, in words."""
        progress = self.progress.get(name)
        if name in self.ended:
            return "done"
        if progress is None:
            return "starting"
        return f"{progress.activity}: {progress.detail}" if progress.detail else progress.activity


class Display(Protocol):
    """Where the board is shown."""

    def refresh(self) -> None:
        """The board has changed."""

    def show(self, renderable: RenderableType) -> None:
        """Print something that stays."""


class TerminalDisplay:
    """A live view at the bottom of a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def refresh(self) -> None:
        """Nothing to do: the live view looks by itself."""

    def show(self, renderable: RenderableType) -> None:
        self._console.print(renderable)


class LineDisplay:
    """Plain lines for pipes and logs: one for each change of what somebody does."""

    def __init__(self, console: Console, board: Board, monotonic_s: Callable[[], float]) -> None:
        self._console = console
        self._board = board
        self._monotonic_s = monotonic_s
        self._said: dict[str, str] = {}

    def refresh(self) -> None:
        self._say("federation", self._board.headline())
        for name in self._board.agents:
            progress = self._board.progress.get(name)
            done = name in self._board.ended
            activity = progress.activity if progress else "starting"
            self._say(name, "done" if done or activity == "ended" else activity)

    def show(self, renderable: RenderableType) -> None:
        self._console.print(renderable)

    def _say(self, who: str, what: str) -> None:
        if self._said.get(who) == what:
            return
        self._said[who] = what
        elapsed_s = self._monotonic_s() - self._board.started_s
        self._console.out(f"[{elapsed_s:6.1f} s] {who}: {what}", highlight=False)


@contextlib.contextmanager
def open_display(console: Console, board: Board, clock: Clock) -> Iterator[Display]:
    """A live view on a terminal, plain lines elsewhere."""
    if not console.is_terminal:
        yield LineDisplay(console, board, clock.monotonic_s)
        return

    def render() -> RenderableType:
        return render_board(board, clock.monotonic_s() - board.started_s)

    with Live(console=console, get_renderable=render, refresh_per_second=_REFRESHES_PER_S, transient=True):
        yield TerminalDisplay(console)


def render_board(board: Board, elapsed_s: float) -> RenderableType:
    """The live view."""
    head = Text.assemble((f"{elapsed_s // 60:02.0f}:{elapsed_s % 60:02.0f} ", "dim"), (board.headline(), "bold"))
    grid = Table.grid(padding=(0, 1))
    for _ in range(4):
        grid.add_column(no_wrap=True)
    for name, description in board.agents.items():
        progress = board.progress.get(name)
        done = name in board.ended
        fraction = 1.0 if done else progress.fraction if progress else 0.0
        idle = not done and (progress is None or progress.activity == "waiting")
        bar = ProgressBar(
            total=1.0, completed=fraction, width=_BAR_CHARACTERS, pulse=idle and progress is None, style="bar.back"
        )
        grid.add_row(
            Text(name, style="bold"),
            Text(description, style="dim"),
            bar,
            Text(board.activity(name), overflow="ellipsis"),
        )
    return Group(head, grid)


async def follow_agent(name: str, address: str, board: Board, display: Display, clock: Clock) -> None:
    """Copy one agent's progress to the board until cancelled; an agent that does not answer yet is asked again."""
    async with open_channel(address, None) as channel:
        while True:
            with contextlib.suppress(SheLoraError):
                async for progress in AgentControlClient(channel).watch():
                    board.progress[name] = progress
                    display.refresh()
            await clock.sleep(_POLL_S)


@contextlib.asynccontextmanager
async def following(addresses: Mapping[str, str], board: Board, display: Display, clock: Clock) -> AsyncIterator[None]:
    """Follow all agents while inside."""
    tasks = [
        asyncio.ensure_future(follow_agent(name, address, board, display, clock)) for name, address in addresses.items()
    ]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass
class Progress:
    """What a federation tells on its way to the end."""

    on_plan: Callable[[Federation, Sequence[RegisteredAgent]], None]
    """Called once, when the first plan is in force."""
    on_round: Callable[[Round], None]
    """Called once for each published round whose members have reported."""


async def follow_federation(
    session: Session, crew: Crew, board: Board, display: Display, clock: Clock, progress: Progress
) -> list[Round]:
    """Wait until the federation has finished and every agent has applied the last average and ended.

    Returns:
        All rounds, oldest first.

    Raises:
        InternalFault: a process ended that should not have; its context names the worker.
        FederationEnded: the federation was stopped.
    """
    planned, shown = False, set[int]()
    while True:
        crew.check((KEYMANAGER, AGGREGATOR))
        statuses = {name: crew.workers[name].exit_status for name in board.agents}
        federation = await session.federations.get(FEDERATION)
        board.federation = federation
        if federation.state is FederationState.STOPPED:
            raise FederationEnded(f"the federation was stopped: {federation.reason or 'no reason given'}")
        board.ended = _ended_agents(crew, statuses, federation.state is FederationState.FINISHED)
        display.refresh()
        if federation.plan is not None and not planned:
            planned = True
            progress.on_plan(federation, await session.federations.agents(FEDERATION))
        over = len(board.ended) == len(board.agents)
        rounds = await session.federations.rounds(FEDERATION)
        for found in rounds:
            if found.number not in shown and (over or is_reported(found)):
                shown.add(found.number)
                progress.on_round(found)
        if over:
            return rounds
        await clock.sleep(_POLL_S)


def is_reported(found: Round) -> bool:
    """Whether a round is published and everybody who counts has reported its accuracy."""
    if found.phase is not RoundPhase.PUBLISHED:
        return False
    return all("accuracy_after" in member.metrics for member in found.members if member.counted)


def _ended_agents(crew: Crew, statuses: Mapping[str, int | None], finished: bool) -> set[str]:
    """Agents that have ended well; `statuses` were taken before the federation was asked whether it has finished."""
    ended = {name for name, status in statuses.items() if status is not None}
    for name in sorted(ended):
        if statuses[name] != 0 or not finished:
            early = "" if finished else " before the federation had finished"
            raise failure(crew.workers[name], f"ended with {describe_exit(statuses[name])}{early}")
    return ended
