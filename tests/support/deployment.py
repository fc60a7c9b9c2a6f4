"""Key manager, aggregator and agents with tiny models in this process: real servers, mutual TLS, real ciphertexts."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from services.aggregator import host as aggregator_host
from services.aggregator.config import AggregatorConfig
from services.client_agent.agent import Agent
from services.client_agent.client import ControlClient
from services.client_agent.config import AgentConfig
from services.client_agent.domain import Status
from services.client_agent.serving import serving
from services.common.channel import open_channel
from services.common.clock import Alarm, Clock, SystemClock
from services.common.identity import Role
from services.common.tls import channel_credentials
from services.operators.client import FederationClient
from services.operators.domain import FederationSpec
from support.keymanager import FEDERATION, Running, serving_keymanager
from support.ports import free_port
from support.tiny_models import sample_rows, save_model, write_jsonl

PATIENCE_S = 60.0


async def until(reached: Callable[[], object], what: str = "", patience_s: float = PATIENCE_S) -> None:
    """Look until it is true."""
    loop = asyncio.get_running_loop()
    end_s = loop.time() + patience_s
    while not reached():
        assert loop.time() < end_s, f"never reached: {what}"
        await asyncio.sleep(0.01)


async def until_seen(look: Callable[[], Awaitable[bool]], what: str = "", patience_s: float = PATIENCE_S) -> None:
    """Look until it is true, where looking is a call."""
    loop = asyncio.get_running_loop()
    end_s = loop.time() + patience_s
    while not await look():
        assert loop.time() < end_s, f"never reached: {what}"
        await asyncio.sleep(0.02)


class JumpingClock(SystemClock):
    """The machine's clock, with an offset that a test sets; sleepers notice."""

    def __init__(self) -> None:
        self._offset_s = 0.0
        self._moved = asyncio.Event()

    def set_offset(self, seconds: float) -> None:
        self._offset_s = seconds
        self._moved.set()
        self._moved = asyncio.Event()

    def now_ms(self) -> int:
        return super().now_ms() + int(self._offset_s * 1000)

    def monotonic_s(self) -> float:
        return super().monotonic_s() + self._offset_s

    async def sleep(self, seconds: float) -> None:
        end_s = self.monotonic_s() + seconds
        while (left_s := end_s - self.monotonic_s()) > 0:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._moved.wait(), left_s)

    def alarm(self, seconds: float, ring: Callable[[], object]) -> Alarm:
        sleeping = asyncio.ensure_future(self.sleep(seconds))
        sleeping.add_done_callback(lambda over: None if over.cancelled() else ring())
        return sleeping


@dataclass
class RunningAgent:
    """One agent with what it serves on its machine."""

    agent: Agent
    life: asyncio.Task[Status]
    ports: dict[str, str | int]
    served: contextlib.AsyncExitStack

    @contextlib.asynccontextmanager
    async def control(self) -> AsyncIterator[ControlClient]:
        async with open_channel(self.agent.config.control_address, None) as channel:
            yield ControlClient(channel)

    async def kill(self) -> None:
        """End it without a word to the federation."""
        self.life.cancel()
        await asyncio.gather(self.life, return_exceptions=True)
        await self.served.aclose()


@dataclass
class Deployment:
    """A federation's services on fixed ports of this machine."""

    folder: Path
    keymanager_ports: tuple[int, int, int] = field(default_factory=lambda: (free_port(), free_port(), free_port()))
    aggregator_port: int = field(default_factory=free_port)
    agents: dict[str, RunningAgent] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model = save_model(self.folder / "model", "bert")
        self._stack = contextlib.AsyncExitStack()
        self._keymanager_stack = contextlib.AsyncExitStack()
        self._aggregator_stack = contextlib.AsyncExitStack()

    @property
    def aggregator_address(self) -> str:
        return f"127.0.0.1:{self.aggregator_port}"

    async def start_keymanager(self) -> None:
        ports = zip(("listen", "enrolment_listen", "membership_listen"), self.keymanager_ports, strict=True)
        addresses: dict[str, Any] = {name: f"127.0.0.1:{port}" for name, port in ports}
        self.keymanager: Running = await self._keymanager_stack.enter_async_context(
            serving_keymanager(self.folder / "keymanager", **addresses)
        )

    async def stop_keymanager(self) -> None:
        await self._keymanager_stack.aclose()

    async def start_aggregator(self, **changes: Any) -> None:
        folder = self.folder / "aggregator"
        enrolment = self.folder / "aggregator.json"
        names = ("localhost", "127.0.0.1")
        (await self.keymanager.enrolment(Role.AGGREGATOR, "aggregator", server_names=names)).save(enrolment)
        config = AggregatorConfig(
            federation=FEDERATION,
            listen=self.aggregator_address,
            ops_listen="127.0.0.1:0",
            state_dir=folder,
            enrolment_file=enrolment,
            **changes,
        )
        stop, ready_file = asyncio.Event(), self.folder / "aggregator-ready.json"
        task = asyncio.create_task(aggregator_host.serve(config, SystemClock(), stop, ready_file))

        async def end() -> None:
            stop.set()
            await task

        self._aggregator_stack.push_async_callback(end)
        await until(lambda: ready_file.exists() or task.done(), "the aggregator serves")
        if task.done():
            task.result()
        ports = json.loads(ready_file.read_text())
        assert ports["grpc"] == self.aggregator_port
        self.aggregator_ops_port = int(ports["ops"])

    async def stop_aggregator(self) -> None:
        await self._aggregator_stack.aclose()

    async def start_operator(self) -> None:
        files = await self.keymanager.member(Role.OPERATOR, "olga")
        channel = open_channel(self.aggregator_address, channel_credentials(files))
        self._stack.push_async_callback(channel.close)
        self.operator = FederationClient(channel)
        async with self.keymanager.client(files) as client:
            self.parameters = (await client.fetch_epoch(0)).parameters

    async def create(self, **changes: Any) -> None:
        """Create and start the federation."""
        fields: dict[str, Any] = {
            "federation": FEDERATION,
            "rounds": 2,
            "target_agents": 3,
            "quorum": 2,
            "epoch": 1,
            "parameters": self.parameters,
        }
        await self.operator.create(FederationSpec(**{**fields, **changes}))
        await self.operator.start(FEDERATION)

    async def enrol(self, name: str) -> Path:
        """An agent's enrolment file."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            (await self.keymanager.enrolment(Role.AGENT, name)).save(path)
        return path

    def config(self, name: str, number: int, **changes: Any) -> AgentConfig:
        """An agent's configuration on data of its own."""
        fields: dict[str, Any] = {
            "federation": FEDERATION,
            "aggregator": self.aggregator_address,
            "enrolment_file": self.folder / f"{name}.json",
            "state_dir": self.folder / name,
            "model": {"source": str(self.model), "labels": ["cat", "dog"]},
            "data": {
                "train": str(write_jsonl(self.folder / f"{name}-train.jsonl", sample_rows(12 + 4 * number))),
                "test": str(write_jsonl(self.folder / f"{name}-test.jsonl", sample_rows(6))),
            },
            "lora": {"rank": 2 + number % 3},
            "training": {"steps": 2, "batch_size": 4, "threads": 1, "device": "cpu", "seed": number},
            "encryption": {"budget": "full", "threads": 1},
            "reveal_dir": self.folder / f"{name}-reveal",
        }
        return AgentConfig.model_validate({**fields, **changes})

    async def start_agent(self, name: str, number: int, clock: Clock | None = None, **changes: Any) -> RunningAgent:
        """A new process of the agent, as its command line makes one; the same name again is a restart."""
        agent, served = Agent(self.config(name, number, **changes), clock=clock), contextlib.AsyncExitStack()
        ports = await served.enter_async_context(serving(agent))
        self.agents[name] = RunningAgent(agent, asyncio.ensure_future(agent.run()), ports, served)
        return self.agents[name]

    async def finish(self) -> None:
        """Wait for all agents to end by themselves."""
        await asyncio.wait_for(asyncio.gather(*(one.life for one in self.agents.values())), PATIENCE_S)

    def reveals(self) -> dict[str, Path]:
        return {name: self.folder / f"{name}-reveal" for name in self.agents}

    async def close(self) -> None:
        for one in self.agents.values():
            await one.kill()
        await self._stack.aclose()
        await self.stop_aggregator()
        await self.stop_keymanager()


@contextlib.asynccontextmanager
async def deployed(folder: Path) -> AsyncIterator[Deployment]:
    """Key manager, aggregator and operator; agents are the test's."""
    deployment = Deployment(folder)
    try:
        await deployment.start_keymanager()
        await deployment.start_aggregator()
        await deployment.start_operator()
        yield deployment
    finally:
        await deployment.close()
