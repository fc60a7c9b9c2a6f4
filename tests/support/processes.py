"""The three services as real processes on loopback: started with ready files, killed at any instant, started again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from services.client_agent.client import ControlClient
from services.client_agent.domain import Status
from services.common.channel import open_channel
from services.common.clock import SystemClock
from services.common.config import load_config
from services.common.enrolment import Enrolment, ensure_identity
from services.common.identity import Identity, Role
from services.common.tls import channel_credentials
from services.keymanager.config import KeyManagerConfig
from services.keymanager.host import initialise, opened
from services.operators.client import FederationClient
from services.operators.domain import Event
from shelora.errors import SheLoraError
from support.ports import free_port
from support.tiny_models import sample_rows, save_model, write_jsonl

ROOT: Final = Path(__file__).parents[2]
FEDERATION: Final = "ward"
PATIENCE_S: Final = 240.0
"""Importing the training libraries alone takes an agent half a minute on a machine that is busy with other things."""

MODULES: Final = {"keymanager": "services.keymanager", "aggregator": "services.aggregator"}


@dataclass
class Site:
    """A folder with configurations, states and logs, and the processes that run on it."""

    folder: Path
    agents: int = 3
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    starts: dict[str, int] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [f"agent-{number}" for number in range(self.agents)]

    async def prepare(self, **agent_fields: Any) -> None:
        """Write configurations, make the keys, hand out enrolment files."""
        ports = [free_port() for _ in range(4)]
        self.aggregator_address = f"127.0.0.1:{ports[2]}"
        self._write(
            "keymanager",
            federation=FEDERATION,
            listen=f"127.0.0.1:{ports[0]}",
            enrolment_listen=f"127.0.0.1:{ports[1]}",
            membership_listen=f"127.0.0.1:{ports[3]}",
            ops_listen="127.0.0.1:0",
            state_dir="keymanager",
            kek_file="kek",
        )
        self.config = load_config(KeyManagerConfig, self.folder / "keymanager.yaml")
        await initialise(self.config, SystemClock())
        async with opened(self.config, SystemClock()) as keymanager:
            self.parameters = (await keymanager.fetch_epoch(None, 1))[0].parameters
        members = [(Role.AGGREGATOR, "aggregator"), (Role.OPERATOR, "olga")]
        for role, name in [*members, *((Role.AGENT, name) for name in self.names)]:
            await self._enrol(role, name)
        self._write(
            "aggregator",
            federation=FEDERATION,
            listen=self.aggregator_address,
            ops_listen="127.0.0.1:0",
            state_dir="aggregator",
            enrolment_file="aggregator.json",
        )
        model = save_model(self.folder / "model", "bert")
        for number, name in enumerate(self.names):
            write_jsonl(self.folder / f"{name}-train.jsonl", sample_rows(16 + 8 * number))
            write_jsonl(self.folder / f"{name}-test.jsonl", sample_rows(6))
            fields: dict[str, Any] = {
                "federation": FEDERATION,
                "aggregator": self.aggregator_address,
                "enrolment_file": f"{name}.json",
                "state_dir": name,
                "model": {"source": str(model), "labels": ["cat", "dog"]},
                "data": {"train": f"./{name}-train.jsonl", "test": f"./{name}-test.jsonl"},
                "lora": {"rank": 2 + number % 3},
                "training": {"steps": 2, "batch_size": 4, "threads": 1, "device": "cpu", "seed": number},
                "encryption": {"budget": ("full", "30%", "5 columns")[number % 3], "threads": 1},
                "reveal_dir": f"{name}-reveal",
            }
            self._write(name, **{**fields, **agent_fields})

    def start(self, name: str) -> None:
        """Start a process; it appends to its log."""
        self.ready_file(name).unlink(missing_ok=True)
        module, action = (MODULES[name], "serve") if name in MODULES else ("services.client_agent.cli", "run")
        command = [sys.executable, "-m", module, action, "--config", str(self.folder / f"{name}.yaml")]
        # Seven agent processes import the same libraries: compile them once, wherever bytecode may not lie beside them.
        settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONPYCACHEPREFIX": str(ROOT / "build/pycache")}
        environment = {**os.environ, **settings}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [*command, "--ready-file", str(self.ready_file(name))],
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.starts[name] = self.starts.get(name, 0) + 1

    def ready_file(self, name: str) -> Path:
        return self.folder / f"{name}.ready"

    async def ready(self, name: str) -> dict[str, Any]:
        """Wait until a process serves."""
        await self.until(self.ready_file(name).exists, f"{name} serves", alive=name)
        return dict(json.loads(self.ready_file(name).read_text()))

    def kill(self, name: str) -> None:
        """SIGKILL, and wait until it is gone."""
        self.processes[name].kill()
        self.processes[name].wait()

    async def exit_code(self, name: str) -> int:
        """Wait until a process ends by itself."""
        process = self.processes[name]
        await self.until(lambda: process.poll() is not None, f"{name} ends")
        assert process.returncode is not None
        return process.returncode

    async def until(self, reached: Callable[[], object], what: str, *, alive: str = "") -> None:
        """Look until it is true, while the named process lives."""
        end_s = time.monotonic() + PATIENCE_S
        while not reached():
            ended = alive and self.processes[alive].poll() is not None
            assert not ended, f"{what}: {alive} ended\n{self.log(alive)[-4000:]}"
            assert time.monotonic() < end_s, f"never reached: {what}\n{self.logs()}"
            await asyncio.sleep(0.01)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def logs(self) -> str:
        """The ends of all logs."""
        return "\n".join(f"--- {name}\n{self.log(name)[-1500:]}" for name in self.processes)

    def reveals(self) -> dict[str, Path]:
        return {name: self.folder / f"{name}-reveal" for name in self.names}

    @contextlib.asynccontextmanager
    async def operator(self) -> AsyncIterator[FederationClient]:
        """Calls to the aggregator; the channel reconnects after a restart of it."""
        files = await ensure_identity(self.folder / "olga", self.folder / "olga.json", SystemClock())
        channel = open_channel(self.aggregator_address, channel_credentials(files))
        try:
            yield FederationClient(channel)
        finally:
            await channel.close()

    async def event(self, operator: FederationClient, kind: str, round_number: int, count: int = 1) -> Event:
        """Wait for the nth event of a kind in a round."""
        seen = 0
        async with contextlib.aclosing(self._events(operator)) as events:
            async for event in events:
                seen += (event.kind, event.round) == (kind, round_number)
                if seen == count:
                    return event
        raise AssertionError("the event stream ended")

    async def status(self, name: str, wanted: Callable[[Status], bool]) -> Status:
        """Wait until an agent's control interface shows a status."""
        end_s = time.monotonic() + PATIENCE_S
        last: Status | None = None
        while time.monotonic() < end_s:
            with contextlib.suppress(SheLoraError):
                async with (
                    open_channel(f"unix:{self.folder / name / 'control.sock'}", None) as channel,
                    contextlib.aclosing(ControlClient(channel).watch()) as statuses,
                ):
                    async for last in statuses:
                        if wanted(last):
                            return last
                        assert time.monotonic() < end_s, f"{name} never got there: {last}\n{self.logs()}"
            await asyncio.sleep(0.02)
        raise AssertionError(f"{name} never got there: {last}\n{self.logs()}")

    def close(self) -> None:
        """Kill whatever still runs."""
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
            process.wait()

    async def _events(self, operator: FederationClient) -> AsyncGenerator[Event, None]:
        """All events from the first, across restarts of the aggregator."""
        after = 0
        end_s = time.monotonic() + PATIENCE_S
        while True:
            with contextlib.suppress(SheLoraError):
                async for event in operator.events(FEDERATION, after):
                    after = event.sequence
                    yield event
            assert time.monotonic() < end_s, f"no events\n{self.logs()}"
            await asyncio.sleep(0.05)

    async def _enrol(self, role: Role, name: str) -> None:
        names = ("localhost", "127.0.0.1") if role is Role.AGGREGATOR else ()
        async with opened(self.config, SystemClock()) as keymanager:
            token = await keymanager.create_token(None, role, name, 3600, names)
        Enrolment.around(token, Identity(FEDERATION, role, name)).save(self.folder / f"{name}.json")

    def _write(self, name: str, **fields: Any) -> None:
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(fields))
