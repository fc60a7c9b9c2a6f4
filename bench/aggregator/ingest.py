"""Ingest of ciphertext by a real aggregator against a bare stream of the same messages, turn by turn."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from bench.aggregator.agents import SyntheticAgent, Workload, begun, connected, silent
from bench.aggregator.stage import Server, Stage
from bench.processes import cpu_s, touch_memory
from bench.records import Record
from services.client_agent.codec import upload_to_proto
from services.client_agent.connection import Connection
from services.client_agent.domain import Upload
from services.common.channel import open_channel
from services.common.identity import Role
from services.common.tls import channel_credentials
from services.common.transfer import payload_header, pieces
from shelora.v1 import aggregator_pb2, aggregator_pb2_grpc, types_pb2


async def uploads(folder: Path, workload: Workload, at_once: int, rounds: int) -> AsyncIterator[Record]:
    """Rounds of a federation; in each, ciphertext goes to the aggregator and the same messages to the bare server.

    Yields:
        One record a round: bytes, seconds of both, CPU seconds of both servers.
    """
    stage = Stage(folder)
    names = [f"agent-{index}" for index in range(max(2, at_once))]
    files = [workload.write(folder / "payloads", seed) for seed in range(len(names))]
    async with contextlib.AsyncExitStack() as stack:
        aggregator = await stack.enter_async_context(stage.aggregator(keep_rounds=1))
        bare = await stack.enter_async_context(stage.bare())
        operator = await stack.enter_async_context(stage.operator(aggregator))
        connections = await stack.enter_async_context(connected(stage, aggregator, names))
        others = await stack.enter_async_context(connected(stage, bare, names))
        agents = [
            SyntheticAgent(connection, workload, *paths) for connection, paths in zip(connections, files, strict=True)
        ]
        await stack.enter_async_context(begun(operator, agents, rounds, folder))
        for number in range(1, rounds + 1):
            await asyncio.gather(*(_send_factors(agent, number) for agent in agents))
            ciphers = [await agent.cipher(number, folder) for agent in agents]
            for first in range(0, len(agents), at_once):
                pairs = list(zip(connections, others, ciphers, strict=True))[first : first + at_once]
                size_bytes = workload.cipher_bytes * len(pairs)
                scratch = folder / "scratch"
                touch_memory(scratch, size_bytes)
                stream_s = await _stream(stage, bare, [cipher for _, _, cipher in pairs])
                touch_memory(scratch, size_bytes)
                bare_s, bare_cpu_s = await _timed(bare, [(other, cipher) for _, other, cipher in pairs])
                touch_memory(scratch, size_bytes)
                product_s, product_cpu_s = await _timed(aggregator, [(one, cipher) for one, _, cipher in pairs])
                yield {
                    "at_once": at_once,
                    "bytes": size_bytes,
                    "round": number,
                    "product_s": product_s,
                    "bare_s": bare_s,
                    "stream_s": stream_s,
                    "product_cpu_s": product_cpu_s,
                    "bare_cpu_s": bare_cpu_s,
                }


async def _send_factors(agent: SyntheticAgent, number: int) -> None:
    await agent.connection.upload(await agent.factors(number), silent)


async def _timed(server: Server, pairs: Sequence[tuple[Connection, Upload]]) -> tuple[float, float]:
    """Seconds until all uploads are acknowledged, and CPU seconds of the server."""
    started, used = time.perf_counter(), cpu_s(server.process_id)
    await asyncio.gather(*(connection.upload(upload, silent) for connection, upload in pairs))
    return time.perf_counter() - started, cpu_s(server.process_id) - used


async def _stream(stage: Stage, server: Server, ciphers: Sequence[Upload]) -> float:
    """Seconds for the messages alone as gRPC and protobuf send them by themselves, without the product's client."""
    credentials = channel_credentials(stage.issue(Role.AGENT, "stream"))
    channels = [open_channel(server.address, credentials) for _ in ciphers]
    await asyncio.gather(*(channel.channel_ready() for channel in channels))
    header = upload_to_proto("bench", ciphers[0], payload_header(b""))

    async def send(channel: Any, path: Path) -> None:
        async def requests() -> AsyncIterator[aggregator_pb2.UploadRequest]:
            yield aggregator_pb2.UploadRequest(header=header)
            for piece in pieces(path):
                chunk = types_pb2.Chunk(offset=piece.offset, data=bytes(piece.data), crc32=piece.crc32)
                yield aggregator_pb2.UploadRequest(chunk=chunk)

        await aggregator_pb2_grpc.RoundServiceStub(channel).Upload(requests())

    started = time.perf_counter()
    await asyncio.gather(*(send(channel, cipher.path) for channel, cipher in zip(channels, ciphers, strict=True)))
    seconds = time.perf_counter() - started
    await asyncio.gather(*(channel.close() for channel in channels))
    return seconds
