"""Memory of a real aggregator while cohorts of different sizes upload all at once."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

from bench.aggregator.agents import SyntheticAgent, Workload, begin, connected, silent
from bench.aggregator.stage import Stage
from bench.processes import memory_bytes
from bench.records import Record
from shelora.rounds.phases import AgentTask

COHORTS: Final = (4, 16, 64, 160)

_SAMPLE_S: Final = 0.02


async def cohorts(folder: Path, workload: Workload) -> AsyncIterator[Record]:
    """One round a cohort size, each in an aggregator of its own; all agents upload at the same time.

    Yields:
        agents, bytes of all ciphertexts, resident bytes before the round, largest of them sampled, largest ever.
    """
    for agents in COHORTS:
        yield await _round(folder / f"cohort-{agents}", workload, agents)


async def _round(folder: Path, workload: Workload, agents: int) -> Record:
    stage = Stage(folder)
    files = workload.write(folder / "payloads")
    names = [f"agent-{index}" for index in range(agents)]
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(stage.aggregator())
        operator = await stack.enter_async_context(stage.operator(server))
        connections = await stack.enter_async_context(connected(stage, server, names))
        members = [SyntheticAgent(connection, workload, *files) for connection in connections]
        await begin(operator, members, 1, folder)
        idle = memory_bytes(server.process_id, "VmRSS")
        sampling = asyncio.create_task(_most(server.process_id))
        await asyncio.gather(*(_take_part(member, folder) for member in members))
        await members[0].until(AgentTask.LEAVE, 0)
        sampling.cancel()
        (found,) = await operator.rounds("bench")
        return {
            "agents": agents,
            "counted": len(found.counted),
            "bytes": agents * workload.cipher_bytes,
            "idle_bytes": idle,
            "sampled_bytes": await sampling,
            "most_bytes": memory_bytes(server.process_id, "VmHWM"),
        }


async def _take_part(member: SyntheticAgent, folder: Path) -> None:
    await member.connection.upload(await member.factors(1), silent)
    await member.connection.upload(await member.cipher(1, folder), silent)


async def _most(process_id: int) -> int:
    """The largest sample until cancelled."""
    most = 0
    try:
        while True:
            most = max(most, memory_bytes(process_id, "VmRSS"))
            await asyncio.sleep(_SAMPLE_S)
    except asyncio.CancelledError:
        return most
