"""Runs one measured federation: key manager, aggregator and agents as processes, mutual TLS, durable uploads."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from bench.workload.load import Run
from services.common.clock import SystemClock
from services.operators.demo.folder import DemoFolder, take_folder
from services.operators.demo.options import EMBEDDED, DemoOptions
from services.operators.demo.processes import Crew
from services.operators.demo.stage import AGGREGATOR, FEDERATION, Stage, environment
from services.operators.demo.verify import RoundCheck, verify_round
from services.operators.domain import Round
from shelora.rounds.phases import FederationState

_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
_POLL_S: Final = 0.2
_PATIENCE_S: Final = 900.0


@dataclass(frozen=True)
class Measured:
    """What one federation did.

    Attributes:
        rounds: the aggregator's figures of every round.
        marks: what each agent process left, by name.
        aggregator_cpu_s: processor seconds of the aggregator over all rounds.
        aggregator_peak_bytes: its largest resident memory.
        aggregator_idle_bytes: its resident memory before the first round.
        check: opened averages against float64 averages of the clear factors, of a verification run.
    """

    rounds: Sequence[Round]
    marks: Mapping[str, Mapping[str, Any]]
    aggregator_cpu_s: float
    aggregator_peak_bytes: int
    aggregator_idle_bytes: int
    check: RoundCheck | None

    def round_seconds(self, number: int) -> float:
        """From the first agent's trained adapter to the last agent's saved average."""
        key = str(number)
        began = min(mark["trained_s"][key] for mark in self.marks.values())
        ended = max(mark["applied_s"][key] for mark in self.marks.values())
        return float(ended - began)


def measure_federation(run: Run, out: Path, *, reveal: bool = False) -> Measured:
    """Run a federation to its end.

    Args:
        run: what is measured.
        out: folder for everything it writes; removed at the end.
        reveal: agents write their clear factors, and the first round is verified instead of measured.

    Raises:
        SheLoraError: a service failed; its log is below `out`.
    """
    with take_folder(out) as folder:
        measured = asyncio.run(_federate(run, folder, reveal))
    shutil.rmtree(out)
    return measured


async def _federate(run: Run, folder: DemoFolder, reveal: bool) -> Measured:
    options = _options(run, folder.root)
    clock = SystemClock()
    crew = Crew(environment(options, os.environ), folder.logs, clock)
    stage = Stage(options, folder, crew, clock, ("0", "1"), 1)
    try:
        profile = stage.write()
        await stage.start_keymanager()
        async with stage.operator(profile) as session:
            await stage.invite(session)
            await stage.start_aggregator()
            await session.federations.create(stage.specification(await session.epoch(0)))
            _start_agents(run, options, folder, crew, reveal)
            await _until_registered(session, run.agents, crew, clock)
            pid = crew.workers[AGGREGATOR].process.pid
            idle_bytes, before_s = _memory(pid, "VmRSS"), _cpu_s(pid)
            await session.federations.start(FEDERATION)
            for name in options.names:
                await crew.finish(crew.workers[name])
            rounds = await session.federations.rounds(FEDERATION)
            cpu_s, peak_bytes = _cpu_s(pid) - before_s, _memory(pid, "VmHWM")
    finally:
        await crew.stop()
    marks = {name: json.loads((folder.agent(name) / "marks.json").read_text()) for name in options.names}
    return Measured(rounds, marks, cpu_s, peak_bytes, idle_bytes, _verify(options, folder) if reveal else None)


def _options(run: Run, out: Path) -> DemoOptions:
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


def _start_agents(run: Run, options: DemoOptions, folder: DemoFolder, crew: Crew, reveal: bool) -> None:
    path = folder.data / "run.json"
    path.write_text(json.dumps({**asdict(run), "packing": run.packing.value}))
    for index, name in enumerate(options.names):
        arguments = ["-m", "bench.workload.agent", "--config", str(folder.agent_config(name)), "--run", str(path)]
        arguments += ["--index", str(index), "--marks", str(folder.agent(name) / "marks.json")]
        crew.start(name, [*arguments, "--reveal"] if reveal else arguments)


async def _until_registered(session: Any, agents: int, crew: Crew, clock: SystemClock) -> None:
    while True:
        crew.check(list(crew.workers)[-agents:])
        found = await session.federations.get(FEDERATION)
        if found.agents == agents or found.state is not FederationState.CREATED:
            return
        await clock.sleep(_POLL_S)


def _verify(options: DemoOptions, folder: DemoFolder) -> RoundCheck:
    """Every agent opens the same sum, so one agent's average is compared."""
    folders = {name: folder.revealed(name) for name in options.names}
    for name in options.names[1:]:
        (folders[name] / "round-001-average.safetensors").unlink()
    return verify_round(folders, 1)


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def _memory(pid: int, name: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"no {name} of process {pid}")
