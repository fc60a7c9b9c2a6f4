"""Whole agents against a federation in memory, each a task: real keys and ciphertexts, the real loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from services.client_agent.agent import Agent
from services.client_agent.config import AgentConfig
from services.client_agent.domain import Status
from support.hurried_clock import HurriedClock
from support.linear_trainer import LinearTrainer
from support.memory_federation import FEDERATION, MemoryFederation
from support.revealed import verify_round


class Ward:
    """A federation with agents a, b, c as tasks of a test."""

    def __init__(self, folder: Path, federation: MemoryFederation, names: str = "abc") -> None:
        self.folder = folder
        self.federation = federation
        self.trainers = {name: LinearTrainer(seed, rank=2 + seed % 3) for seed, name in enumerate(names)}
        self.agents: dict[str, Agent] = {}
        self.lives: dict[str, asyncio.Task[Status]] = {}
        self.clocks: dict[str, HurriedClock] = {}

    def start(self, name: str, budget: str = "full", **fields: object) -> Agent:
        """A new process of the agent, on the same folder."""
        config = AgentConfig.model_validate(
            {
                "federation": FEDERATION,
                "aggregator": "127.0.0.1:1",
                "state_dir": self.folder / name,
                "data": {"train": "train.jsonl", "test": "test.jsonl"},
                "lora": {"rank": self.trainers[name].rank},
                "encryption": {"budget": budget, "threads": 1},
                "reveal_dir": self.folder / f"{name}-reveal",
                **fields,
            }
        )

        async def connector(*_: object):
            return self.federation.membership(name)

        self.clocks[name] = HurriedClock()
        self.agents[name] = Agent(
            config,
            clock=self.clocks[name],
            trainer_factory=lambda *_: self.trainers[name],
            connector=connector,
        )
        self.lives[name] = asyncio.ensure_future(self.agents[name].run())
        return self.agents[name]

    def start_all(self, budget: str = "full") -> None:
        for name in self.trainers:
            self.start(name, budget)

    async def kill(self, name: str) -> None:
        """End an agent without a word to the federation."""
        self.trainers[name].gate.set()
        self.lives[name].cancel()
        await asyncio.gather(self.lives[name], return_exceptions=True)

    async def until(self, reached: Callable[[], object]) -> None:
        """Look until it is true, for half a minute at most."""
        loop = asyncio.get_running_loop()
        end_s = loop.time() + 30
        while not reached():
            assert loop.time() < end_s, f"never reached; {[agent.board.status for agent in self.agents.values()]}"
            await asyncio.sleep(0.002)

    async def finish(self) -> list[Status]:
        return await asyncio.wait_for(asyncio.gather(*self.lives.values()), 60)

    def verify(self, number: int):
        return verify_round({name: self.folder / f"{name}-reveal" for name in self.trainers}, number)
