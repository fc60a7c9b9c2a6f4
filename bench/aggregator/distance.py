"""Uploads to and downloads from an aggregator that is far away: a relay lets every byte wait."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import anyio
from anyio.abc import SocketAttribute, SocketStream

from bench.aggregator.agents import SyntheticAgent, Workload, begun, connected, silent
from bench.aggregator.stage import Stage
from bench.records import Record
from services.client_agent.domain import PayloadKind

_AGENTS: Final = 2
_ROUNDS: Final = 2
_READ_BYTES: Final = 256 << 10
_GONE: Final = (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError)


async def distances(
    folder: Path, workload: Workload, round_trips_s: Sequence[float], windows: Sequence[int]
) -> AsyncIterator[Record]:
    """Rounds of two agents behind a relay, which limits nothing else; one transfer at a time.

    Yields:
        One record a window, round trip and agent, of the last round: their values, bytes, seconds up and down.
    """
    for window in windows:
        for round_trip_s in round_trips_s:
            place = folder / f"{window}-{round_trip_s}"
            async for record in _far(place, workload, round_trip_s, window):
                yield {"window_bytes": window, "round_trip_s": round_trip_s, **record}


async def _far(folder: Path, workload: Workload, round_trip_s: float, window: int) -> AsyncIterator[Record]:
    stage = Stage(folder)
    names = [f"agent-{index}" for index in range(_AGENTS)]
    files = workload.write(folder / "payloads")
    async with contextlib.AsyncExitStack() as stack:
        near = await stack.enter_async_context(stage.aggregator(limits={"upload_window_bytes": window}))
        address = await stack.enter_async_context(relay(near.address, round_trip_s / 2))
        operator = await stack.enter_async_context(stage.operator(near))
        connections = await stack.enter_async_context(connected(stage, replace(near, address=address), names))
        agents = [SyntheticAgent(connection, workload, *files) for connection in connections]
        await stack.enter_async_context(begun(operator, agents, _ROUNDS, folder))
        for number in range(1, _ROUNDS + 1):
            for agent in agents:
                await agent.connection.upload(await agent.factors(number), silent)
            ciphers = [await agent.cipher(number, folder) for agent in agents]
            up_s = []
            for agent, cipher in zip(agents, ciphers, strict=True):
                started = time.perf_counter()
                await agent.connection.upload(cipher, silent)
                up_s.append(time.perf_counter() - started)
            await agents[0].published(number)
            for agent, seconds in zip(agents, up_s, strict=True):
                target = folder / f"sum-{agent.connection.name}"
                started = time.perf_counter()
                await agent.connection.download(PayloadKind.CIPHER, target, silent, round_number=number)
                if number == _ROUNDS:  # Connections have found their pace by then.
                    down_s = time.perf_counter() - started
                    yield {"bytes": workload.cipher_bytes, "up_s": seconds, "down_s": down_s}
                target.unlink()


@contextlib.asynccontextmanager
async def relay(address: str, delay_s: float) -> AsyncIterator[str]:
    """A server on this machine that passes everything on to an address and back, each byte after a while.

    Args:
        address: host:port.
        delay_s: how long a byte waits, each way.
    """
    host, _, port = address.rpartition(":")

    async def accept(near: SocketStream) -> None:
        async with near, await anyio.connect_tcp(host, int(port)) as far, anyio.create_task_group() as tasks:
            tasks.start_soon(_pass_on, near, far, delay_s)
            tasks.start_soon(_pass_on, far, near, delay_s)

    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, accept)
        port_here = listener.extra(SocketAttribute.local_port)  # noqa: S610  # anyio's, not a query's
        yield f"127.0.0.1:{port_here}"
        tasks.cancel_scope.cancel()


async def _pass_on(source: SocketStream, target: SocketStream, delay_s: float) -> None:
    waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

    async def write() -> None:
        with contextlib.suppress(*_GONE):
            while True:
                due, data = await waiting.get()
                await anyio.sleep_until(due)
                if not data:
                    await target.send_eof()
                    return
                await target.send(data)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(write)
        with contextlib.suppress(*_GONE):
            while True:
                data = await source.receive(_READ_BYTES)
                waiting.put_nowait((anyio.current_time() + delay_s, data))
        waiting.put_nowait((anyio.current_time() + delay_s, b""))
