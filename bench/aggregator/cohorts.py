"""Memory and CPU time of a real aggregator while cohorts of different sizes do everything at once."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Final

from bench.aggregator.agents import SyntheticAgent, Workload, begin, connected, silent
from bench.aggregator.stage import Stage
from bench.processes import cpu_s, memory_bytes
from bench.records import Record
from shelora.rounds.phases import AgentTask

_SAMPLE_S: Final = 0.02


async def cohorts(folder: Path, workload: Workload, sizes: Sequence[int]) -> AsyncIterator[Record]:
    """One round a cohort size, each in an aggregator of its own; all agents act at the same time.

    Yields:
        agents, bytes of all ciphertexts, seconds and CPU seconds from registration to publication, resident bytes
        before the round, largest of them sampled, largest ever.
    """
    for agents in sizes:
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
        started, used = time.perf_counter(), cpu_s(server.process_id)
        await begin(operator, members, 1, folder)
        idle = memory_bytes(server.process_id, "VmRSS")
        watching = [asyncio.create_task(_watch(member)) for member in members]
        sampling = asyncio.create_task(_most(server.process_id))
        await asyncio.gather(*(_take_part(member, folder) for member in members))
        await members[0].until(AgentTask.LEAVE, 0)
        seconds, used = time.perf_counter() - started, cpu_s(server.process_id) - used
        for task in (sampling, *watching):
            task.cancel()
        await asyncio.gather(*watching, return_exceptions=True)
        (found,) = await operator.rounds("bench")
        return {
            "agents": agents,
            "counted": len(found.counted),
            "bytes": agents * workload.cipher_bytes,
            "seconds": seconds,
            "cpu_s": used,
            "idle_bytes": idle,
            "sampled_bytes": await sampling,
            "most_bytes": memory_bytes(server.process_id, "VmHWM"),
        }


async def _take_part(member: SyntheticAgent, folder: Path) -> None:
    await member.connection.upload(await member.factors(1), silent)
    await member.connection.upload(await member.cipher(1, folder), silent)


async def _watch(member: SyntheticAgent) -> None:
    """Listen like a real agent, all the time."""
    async with contextlib.aclosing(member.connection.watch()) as views:
        async for _ in views:
            pass


async def _most(process_id: int) -> int:
    """The largest sample until cancelled."""
    most = 0
    try:
        while True:
            most = max(most, memory_bytes(process_id, "VmRSS"))
            await asyncio.sleep(_SAMPLE_S)
    except asyncio.CancelledError:
        return most
