"""Memory and CPU time of a real aggregator while cohorts of different sizes do everything at once."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.aggregator.agents import SyntheticAgent, Workload, begun, connected, silent
from bench.aggregator.stage import Stage
from bench.processes import cpu_s, memory_bytes
from bench.records import Record
from services.aggregator.pacing import CONNECTED_AGENTS
from shelora.rounds.phases import AgentTask

_SAMPLE_S: Final = 0.02


@dataclass(frozen=True)
class Cohort:
    """Agents that take part in every round, all at the same time.

    Attributes:
        agents: how many.
        rounds: of the federation.
        places: agents that may be connected at once (`limits.connected_agents`).
    """

    agents: int
    rounds: int = 1
    places: int = CONNECTED_AGENTS


async def cohorts(folder: Path, workload: Workload, chosen: Sequence[Cohort]) -> AsyncIterator[Record]:
    """A federation a cohort, each in an aggregator of its own.

    Yields:
        agents, rounds, places, bytes of all ciphertexts, seconds and CPU seconds from registration to the last
        publication, resident bytes before the first round, largest of them sampled, largest ever.
    """
    for cohort in chosen:
        yield await _federation(folder / f"{cohort.agents}-{cohort.rounds}-{cohort.places}", workload, cohort)


async def _federation(folder: Path, workload: Workload, cohort: Cohort) -> Record:
    stage = Stage(folder)
    files = workload.write(folder / "payloads")
    names = [f"agent-{index}" for index in range(cohort.agents)]
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(
            stage.aggregator(keep_rounds=1, limits={"connected_agents": cohort.places})
        )
        operator = await stack.enter_async_context(stage.operator(server))
        connections = await stack.enter_async_context(connected(stage, server, names))
        members = [SyntheticAgent(connection, workload, *files) for connection in connections]
        started, used = time.perf_counter(), cpu_s(server.process_id)
        await stack.enter_async_context(begun(operator, members, cohort.rounds, folder))
        idle = memory_bytes(server.process_id, "VmRSS")
        sampling = asyncio.create_task(_most(server.process_id))
        await asyncio.gather(*(_take_part(member, cohort.rounds, folder) for member in members))
        await members[0].until(AgentTask.LEAVE, 0)
        seconds, used = time.perf_counter() - started, cpu_s(server.process_id) - used
        sampling.cancel()
        found = await operator.rounds("bench")
        return {
            "agents": cohort.agents,
            "rounds": cohort.rounds,
            "places": cohort.places,
            "counted": sum(len(one.counted) for one in found),
            "bytes": cohort.agents * cohort.rounds * workload.cipher_bytes,
            "seconds": seconds,
            "cpu_s": used,
            "idle_bytes": idle,
            "sampled_bytes": await sampling,
            "most_bytes": memory_bytes(server.process_id, "VmHWM"),
        }


async def _take_part(member: SyntheticAgent, rounds: int, folder: Path) -> None:
    for number in range(1, rounds + 1):
        await member.connection.upload(await member.factors(number), silent)
        await member.connection.upload(await member.cipher(number, folder), silent)


async def _most(process_id: int) -> int:
    """The largest sample until cancelled."""
    most = 0
    try:
        while True:
            most = max(most, memory_bytes(process_id, "VmRSS"))
            await asyncio.sleep(_SAMPLE_S)
    except asyncio.CancelledError:
        return most
