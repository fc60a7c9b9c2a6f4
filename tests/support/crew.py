"""Agents of a MemoryFederation without their event loop: tasks are called by hand, workers may be thrown away."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from services.client_agent.domain import Registration, Status
from services.client_agent.figures import RoundFigures
from services.client_agent.keys import KeyRing
from services.client_agent.kit import Kit
from services.client_agent.progress import StatusBoard
from services.client_agent.reveal import Reveal
from services.client_agent.state import AgentState
from services.client_agent.worker import RoundWorker
from shelora.rounds import AgentTask
from support.hurried_clock import HurriedClock
from support.linear_trainer import LinearTrainer
from support.memory_federation import FEDERATION, MemoryFederation


@dataclass(eq=False)
class Hand:
    """One agent: its folder stays, everything else can be made anew."""

    federation: MemoryFederation
    name: str
    folder: Path
    trainer: LinearTrainer
    columns: tuple[int, ...]
    evaluate: bool = True
    starts: int = 0
    worker: RoundWorker = field(init=False)

    def __post_init__(self) -> None:
        self.start()

    @property
    def reveal(self) -> Path:
        return self.folder / "reveal"

    @property
    def state(self) -> AgentState:
        return AgentState(self.folder / "state")

    def start(self) -> None:
        """A new process on the same folder."""
        self.starts += 1
        membership = self.federation.membership(self.name)
        self.keys = KeyRing(self.state, FEDERATION, self.name, membership.fetch_epoch, threads=1)
        self.board = StatusBoard(Status(self.name, FEDERATION, self.trainer.rank, "full"))
        self.kit = Kit(
            state=self.state,
            keys=self.keys,
            trainer=self.trainer,
            aggregator=membership,
            board=self.board,
            clock=HurriedClock(),
            figures=RoundFigures(self.state),
            columns=self.columns,
            evaluate=self.evaluate,
            reveal=Reveal(self.reveal),
        )
        self.worker = RoundWorker(self.kit)

    async def register(self) -> None:
        epoch = await self.keys.epoch(1)
        trainer = self.trainer
        await self.federation.membership(self.name).register(
            Registration(
                rank=trainer.sent_rank,
                columns=self.columns,
                budget="full",
                signature=trainer.signature,
                epoch=1,
                parameters_digest=epoch.parameters.digest(),
                examples=trainer.examples,
            )
        )

    async def step(self) -> AgentTask:
        """Do what the view asks for, once."""
        view = self.federation.view(self.name)
        if view.task is AgentTask.NEGOTIATE:
            await self.worker.negotiate(view)
        elif view.task is AgentTask.FACTORS:
            await self.worker.factors(view)
        elif view.task is AgentTask.CIPHER:
            await self.worker.cipher(view)
        elif view.task is AgentTask.LEAVE:
            await self.worker.apply(view.last_published_round)
        return view.task


async def run_to_end(hands: list[Hand], limit: int = 200) -> None:
    """Let everyone do its task by turns until the federation is over and its last average applied."""
    for _ in range(limit):
        tasks = [await hand.step() for hand in hands]
        if all(task is AgentTask.LEAVE for task in tasks):
            return
    raise AssertionError(f"no end in sight: {[hand.federation.view(hand.name) for hand in hands]}")
