"""A real aggregator for tests, with servers, database and computations; and members that call it over mutual TLS."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from services.aggregator import host
from services.aggregator.config import AggregatorConfig
from services.common.channel import call, open_channel, receive_stream, send_stream
from services.common.clock import Clock, SystemClock
from services.common.codec import parameters_to_proto, shapes_to_proto
from services.common.identity import Role
from services.common.tls import channel_credentials
from services.common.transfer import payload_header, pieces
from services.common.versions import own_version
from shelora.plan import ModelShapes
from shelora.v1 import aggregator_pb2, aggregator_pb2_grpc, types_pb2
from support.authority import ThrowawayAuthority
from support.updates import PARAMETERS, SHAPES

FEDERATION = "ward"
TIMEOUT_S = 30.0


@dataclass(frozen=True)
class RunningAggregator:
    """Where a started aggregator is."""

    authority: ThrowawayAuthority
    config: AggregatorConfig
    ports: dict[str, int]

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.ports['grpc']}"

    @property
    def ops_url(self) -> str:
        return f"http://127.0.0.1:{self.ports['ops']}"

    @contextlib.asynccontextmanager
    async def member(self, role: Role, name: str, **changes: Any) -> AsyncIterator[Member]:
        """A caller with a certificate of its own."""
        async with self.channel(channel_credentials(self.authority.issue(role, name, **changes))) as channel:
            yield Member(name, channel)

    @contextlib.asynccontextmanager
    async def channel(self, credentials: grpc.ChannelCredentials) -> AsyncIterator[grpc.aio.Channel]:
        channel = open_channel(self.address, credentials)
        try:
            yield channel
        finally:
            await channel.close()


@contextlib.asynccontextmanager
async def running_aggregator(
    folder: Path, clock: Clock | None = None, **changes: Any
) -> AsyncIterator[RunningAggregator]:
    """Start an aggregator in this process as its command line does, and drain it in the end."""
    authority = ThrowawayAuthority(folder / "identities", FEDERATION)
    fields: dict[str, Any] = {
        "federation": FEDERATION,
        "listen": "127.0.0.1:0",
        "ops_listen": "127.0.0.1:0",
        "state_dir": folder / "state",
        "identity_dir": authority.issue(Role.AGGREGATOR, "aggregator").folder,
    }
    config = AggregatorConfig(**{**fields, **changes})
    stop, ready_file = asyncio.Event(), folder / "ready.json"
    task = asyncio.create_task(host.serve(config, clock or SystemClock(), stop, ready_file))
    try:
        while not ready_file.exists():
            if task.done():
                task.result()
            await asyncio.sleep(0.01)
        yield RunningAggregator(authority, config, json.loads(ready_file.read_text()))
    finally:
        stop.set()
        await task


def specification(**changes: Any) -> aggregator_pb2.FederationSpec:
    """A federation of two rounds and three agents with long deadlines."""
    fields: dict[str, Any] = {
        "federation": FEDERATION,
        "rounds": 2,
        "target_agents": 3,
        "quorum": 2,
        "gather_timeout_s": 600,
        "negotiate_timeout_s": 600,
        "train_timeout_s": 600,
        "cipher_timeout_s": 600,
        "epoch": 1,
        "parameters": parameters_to_proto(PARAMETERS),
        "negotiation": aggregator_pb2.NEGOTIATION_ENCRYPTED,
    }
    return aggregator_pb2.FederationSpec(**{**fields, **changes})


class Member:
    """Calls of one agent or operator; the errors of the tree come back as they are.

    Attributes:
        name: name in the certificate.
        federations: stub for operators.
        rounds: stub for agents.
    """

    def __init__(self, name: str, channel: grpc.aio.Channel) -> None:
        self.name = name
        self.federations = aggregator_pb2_grpc.FederationServiceStub(channel)
        self.rounds = aggregator_pb2_grpc.RoundServiceStub(channel)

    async def create(self, **changes: Any) -> aggregator_pb2.Federation:
        request = aggregator_pb2.CreateFederationRequest(spec=specification(**changes))
        return (await call(self.federations.CreateFederation, request, timeout_s=TIMEOUT_S)).federation

    async def start(self) -> aggregator_pb2.Federation:
        request = aggregator_pb2.StartFederationRequest(federation=FEDERATION)
        return (await call(self.federations.StartFederation, request, timeout_s=TIMEOUT_S)).federation

    async def federation(self) -> aggregator_pb2.Federation:
        request = aggregator_pb2.GetFederationRequest(federation=FEDERATION)
        return (await call(self.federations.GetFederation, request, timeout_s=TIMEOUT_S)).federation

    async def register(self, rank: int, columns: Sequence[int], **changes: Any) -> aggregator_pb2.AgentView:
        request = registration(rank, columns, **changes)
        return (await call(self.rounds.RegisterAgent, request, timeout_s=TIMEOUT_S)).view

    async def until(self, task: int, *, round_number: int | None = None) -> aggregator_pb2.AgentView:
        """Wait until the view asks for a task (of a round)."""
        stream = receive_stream(
            self.rounds.WatchFederation, aggregator_pb2.WatchFederationRequest(federation=FEDERATION), timeout_s=60
        )
        async with contextlib.aclosing(stream) as views:
            async for message in views:
                if message.view.task == task and round_number in (None, message.view.round):
                    return message.view
        raise AssertionError("the view stream ended")

    async def upload(
        self, header: aggregator_pb2.UploadHeader, payload: bytes, offset: int = 0
    ) -> aggregator_pb2.UploadResponse:
        async def requests() -> AsyncIterator[aggregator_pb2.UploadRequest]:
            yield aggregator_pb2.UploadRequest(header=header)
            for piece in pieces(payload, offset):
                chunk = types_pb2.Chunk(offset=piece.offset, data=bytes(piece.data), crc32=piece.crc32)
                yield aggregator_pb2.UploadRequest(chunk=chunk)

        return await send_stream(self.rounds.Upload, requests(), timeout_s=TIMEOUT_S)

    async def staged(self, header: aggregator_pb2.UploadHeader) -> aggregator_pb2.GetUploadResponse:
        request = aggregator_pb2.GetUploadRequest(header=header)
        return await call(self.rounds.GetUpload, request, timeout_s=TIMEOUT_S)

    async def download(self, **fields: Any) -> tuple[aggregator_pb2.DownloadHeader, bytes]:
        """A payload from an offset on, with its header."""
        request = aggregator_pb2.DownloadRequest(federation=FEDERATION, **fields)
        header, data = None, b""
        async for message in receive_stream(self.rounds.Download, request, timeout_s=TIMEOUT_S):
            if header is None:
                header = message.header
            else:
                assert message.chunk.offset == request.offset + len(data)
                data += message.chunk.data
        assert header is not None
        return header, data

    async def events(self, after: int, until: str) -> list[aggregator_pb2.WatchEventsResponse]:
        """Events after a sequence number, up to the first of a kind."""
        request = aggregator_pb2.WatchEventsRequest(federation=FEDERATION, after=after)
        found: list[aggregator_pb2.WatchEventsResponse] = []
        async with contextlib.aclosing(
            receive_stream(self.federations.WatchEvents, request, timeout_s=TIMEOUT_S)
        ) as events:
            async for event in events:
                found.append(event)
                if event.kind == until:
                    break
        return found

    async def leave(self, round_number: int, reason: str = "out of memory") -> None:
        request = aggregator_pb2.LeaveRoundRequest(federation=FEDERATION, round=round_number, reason=reason)
        await call(self.rounds.LeaveRound, request, timeout_s=TIMEOUT_S)

    async def report(self, round_number: int, **metrics: float) -> None:
        request = aggregator_pb2.ReportRoundRequest(federation=FEDERATION, round=round_number, metrics=metrics)
        await call(self.rounds.ReportRound, request, timeout_s=TIMEOUT_S)


def registration(
    rank: int, columns: Sequence[int], shapes: ModelShapes = SHAPES, **changes: Any
) -> aggregator_pb2.RegisterAgentRequest:
    """A registration of the test model."""
    fields: dict[str, Any] = {
        "federation": FEDERATION,
        "version": own_version(),
        "rank": rank,
        "encrypted_columns": columns,
        "budget": "25%",
        "signature": types_pb2.ModelSignature(
            shapes=shapes_to_proto(shapes),
            base_model_digest=bytes(32),
            tokenizer_digest=bytes(32),
            task="sequence-classification",
            labels_digest=bytes(32),
        ),
        "epoch": 1,
        "parameters_digest": PARAMETERS.digest(),
        "examples": 100,
    }
    return aggregator_pb2.RegisterAgentRequest(**{**fields, **changes})


def upload_header(
    view: aggregator_pb2.AgentView, kind: int, payload: bytes, **changes: Any
) -> aggregator_pb2.UploadHeader:
    """The header of an upload that fits an agent's view."""
    negotiating = kind in {aggregator_pb2.PAYLOAD_KIND_SENSITIVITY, aggregator_pb2.PAYLOAD_KIND_VOTES}
    fields: dict[str, Any] = {
        "federation": FEDERATION,
        "round": 0 if negotiating else view.round,
        "plan_version": view.plan.version,
        "kind": kind,
        "payload": payload_header(payload),
        "epoch": view.plan.epoch,
        "plan_digest": view.plan.digest,
        "examples": 100 if kind == aggregator_pb2.PAYLOAD_KIND_FACTORS else 0,
    }
    return aggregator_pb2.UploadHeader(**{**fields, **changes})
