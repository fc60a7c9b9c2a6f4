"""Runs one measured federation: key manager, aggregator and agents as processes, mutual TLS, durable uploads."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench.processes import cpu_s, memory_bytes
from bench.speed.load import Run
from services.common.clock import SystemClock
from services.operators.demo.folder import DemoFolder, take_folder
from services.operators.demo.options import EMBEDDED, DemoOptions
from services.operators.demo.processes import Crew
from services.operators.demo.shares import deal
from services.operators.demo.stage import AGGREGATOR, FEDERATION, Stage, environment
from services.operators.demo.verify import RoundCheck, verify_round
from services.operators.domain import Round
from services.operators.session import Session

_POLL_S: Final = 0.2
_PATIENCE_S: Final = 900.0


@dataclass(frozen=True)
class ServerUse:
    """What the averaging process used.

    Attributes:
        cpu_s: processor seconds over all rounds.
        idle_bytes: resident memory before the first round.
        peak_bytes: largest resident memory.
    """

    cpu_s: float
    idle_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class Measured:
    """What one federation did.

    Attributes:
        rounds: the aggregator's figures of every round; none where the average was plain.
        marks: what each agent process left, by name.
        server: what the averaging process used.
        check: opened averages against float64 averages of the clear factors, of a verification run.
    """

    rounds: Sequence[Round]
    marks: Mapping[str, Mapping[str, Any]]
    server: ServerUse
    check: RoundCheck | None

    def round_seconds(self, number: int) -> float:
        """From the first agent's begin of training (which given updates need no time for) to the last saved average."""
        key = str(number)
        began = min(mark["trained_s"][key] for mark in self.marks.values())
        ended = max(mark["applied_s"][key] for mark in self.marks.values())
        return float(ended - began)


def measure_federation(
    options: DemoOptions, run: Run | None = None, *, plain: bool = False, reveal: bool = False
) -> Measured:
    """Run a federation to its end, in the folder of its options, which is removed afterwards.

    Args:
        options: agents, budgets, rounds.
        run: sizes of given updates (see `given_options`); without it agents train the model of the options.
        plain: average in the clear instead (`bench.speed.plain`).
        reveal: agents write their clear factors and the first round is verified; it is not for timing then.

    Raises:
        SheLoraError: a process failed; its log is in the folder.
    """
    with take_folder(options.out) as folder:
        labels: tuple[str, ...] = ("0", "1")
        if run is None:
            shares = deal(options)
            shares.write(folder)
            labels = shares.labels
        measured = asyncio.run(_Play(options, folder, labels, run, plain, reveal).perform())
    shutil.rmtree(options.out)
    return measured


def given_options(run: Run, out: Path) -> DemoOptions:
    """Options of a federation with given updates."""
    return DemoOptions(
        data=out / "none.jsonl",
        test=None,
        model=EMBEDDED,
        ranks=tuple(run.rank(index) for index in range(run.agents)),
        budgets=tuple(run.budget(index) for index in range(run.agents)),
        rounds=run.rounds,
        compare=False,
        out=out,
        packing=run.packing,
    )


class _Play:
    """One federation's processes."""

    def __init__(
        self,
        options: DemoOptions,
        folder: DemoFolder,
        labels: Sequence[str],
        run: Run | None,
        plain: bool,
        reveal: bool,
    ) -> None:
        self._options, self._folder = options, folder
        self._run, self._plain, self._reveal = run, plain, reveal
        self._clock = SystemClock()
        self._crew = Crew(environment(options, os.environ), folder.logs, self._clock)
        self._stage = Stage(options, folder, self._crew, self._clock, labels, 1)

    async def perform(self) -> Measured:
        try:
            profile = self._stage.write()
            await self._stage.start_keymanager()
            async with self._stage.operator(profile) as session:
                await self._stage.invite(session)
                rounds, server = await (self._average_plainly() if self._plain else self._federate(session))
        finally:
            await self._crew.stop()
        names = self._options.names
        marks = {name: json.loads((self._folder.agent(name) / "marks.json").read_text()) for name in names}
        return Measured(rounds, marks, server, self._verify() if self._reveal else None)

    async def _federate(self, session: Session) -> tuple[Sequence[Round], ServerUse]:
        await self._stage.start_aggregator()
        await session.federations.create(self._stage.specification(await session.epoch(0)))
        self._start_agents()
        await self._until_registered(session)
        meter = Meter(self._crew.workers[AGGREGATOR].process.pid)
        await session.federations.start(FEDERATION)
        await self._finish_agents()
        return await session.federations.rounds(FEDERATION), meter.read()

    async def _average_plainly(self) -> tuple[Sequence[Round], ServerUse]:
        config, ready = self._folder.aggregator / "aggregator.yaml", self._folder.aggregator / "ready.json"
        arguments = ["-m", "bench.speed.plain", "--config", str(config), "--agents", str(self._options.agents)]
        worker = self._crew.start(AGGREGATOR, [*arguments, "--ready-file", str(ready)])
        await self._crew.ready(worker, ready, _PATIENCE_S)
        meter = Meter(worker.process.pid)
        self._start_agents()
        await self._finish_agents()
        return (), meter.read()

    def _start_agents(self) -> None:
        path = self._folder.data / "run.json"
        if self._run is not None:
            self._run.save(path)
        for index, name in enumerate(self._options.names):
            arguments = ["-m", "bench.speed.agent", "--config", str(self._folder.agent_config(name))]
            arguments += ["--marks", str(self._folder.agent(name) / "marks.json")]
            if self._run is not None:
                arguments += ["--run", str(path), "--index", str(index)]
            if self._plain:
                arguments += ["--plain", str(self._options.rounds)]
            if self._reveal:
                arguments += ["--reveal"]
            self._crew.start(name, arguments)

    async def _finish_agents(self) -> None:
        for name in self._options.names:
            await self._crew.finish(self._crew.workers[name])

    async def _until_registered(self, session: Session) -> None:
        while (await session.federations.get(FEDERATION)).agents < self._options.agents:
            self._crew.check([AGGREGATOR, *self._options.names])
            await self._clock.sleep(_POLL_S)

    def _verify(self) -> RoundCheck:
        """Every agent opens the same sum, so one agent's average is compared."""
        folders = {name: self._folder.revealed(name) for name in self._options.names}
        for name in self._options.names[1:]:
            (folders[name] / "round-001-average.safetensors").unlink()
        return verify_round(folders, 1)


class Meter:
    """What a process uses from now on."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._idle_bytes, self._before_s = memory_bytes(pid, "VmRSS"), cpu_s(pid)

    def read(self) -> ServerUse:
        """Use so far."""
        return ServerUse(cpu_s(self._pid) - self._before_s, self._idle_bytes, memory_bytes(self._pid, "VmHWM"))
