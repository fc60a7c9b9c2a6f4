"""The wire in front of the service: who may call, what came in, what goes out. No decisions beyond that."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Final, TypeAlias, TypeVar, cast

import anyio
import anyio.to_thread
import grpc

from services.aggregator import codec
from services.aggregator.revocations import Revocations
from services.aggregator.service import AggregatorService
from services.common.blobs import Blob, BlobStore
from services.common.chunk_codec import ROUNDS, reader, serialize
from services.common.codec import parameters_from_proto
from services.common.identity import Identity, Role, require_role
from services.common.patience import Patience
from services.common.transfer import STAGED_BYTES, Piece, check_order, pieces
from services.common.versions import check_peer_version, own_version
from shelora.errors import MalformedPayload, Unavailable, UnknownBlob
from shelora.v1 import aggregator_pb2, aggregator_pb2_grpc

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
T = TypeVar("T")

SILENCE_S: Final = 60.0
"""Longest wait for the next message of an upload."""


class Door:
    """Lets in who may call.

    Args:
        revocations: who may not although the certificate is valid.
    """

    def __init__(self, revocations: Revocations) -> None:
        self._revocations = revocations

    def admit(self, context: Context, *roles: Role, federation: str | None = None) -> Identity:
        """The caller, if it has one of the roles, belongs to the federation and is not revoked.

        Raises:
            NotAuthenticated, RoleDenied, AgentRevoked: as the names say.
        """
        identity = require_role(context, *roles, federation=federation)
        self._revocations.check(identity)
        return identity


class FederationServicer(aggregator_pb2_grpc.FederationServiceServicer):
    """What operators call.

    Args:
        service: the use cases.
        door: decides who may call.
    """

    def __init__(self, service: AggregatorService, door: Door) -> None:
        self._service = service
        self._door = door

    async def CreateFederation(
        self, request: aggregator_pb2.CreateFederationRequest, context: Context
    ) -> aggregator_pb2.CreateFederationResponse:
        self._door.admit(context, Role.OPERATOR, federation=request.spec.federation)
        found = await self._service.create_federation(codec.spec_from_proto(request.spec))
        return aggregator_pb2.CreateFederationResponse(federation=codec.federation_to_proto(found))

    async def StartFederation(
        self, request: aggregator_pb2.StartFederationRequest, context: Context
    ) -> aggregator_pb2.StartFederationResponse:
        self._door.admit(context, Role.OPERATOR, federation=request.federation)
        found = await self._service.start_federation(request.federation, request.more_rounds)
        return aggregator_pb2.StartFederationResponse(federation=codec.federation_to_proto(found))

    async def StopFederation(
        self, request: aggregator_pb2.StopFederationRequest, context: Context
    ) -> aggregator_pb2.StopFederationResponse:
        self._door.admit(context, Role.OPERATOR, federation=request.federation)
        found = await self._service.stop_federation(request.federation, request.reason)
        return aggregator_pb2.StopFederationResponse(federation=codec.federation_to_proto(found))

    async def AdoptEpoch(
        self, request: aggregator_pb2.AdoptEpochRequest, context: Context
    ) -> aggregator_pb2.AdoptEpochResponse:
        self._door.admit(context, Role.OPERATOR, federation=request.federation)
        parameters = parameters_from_proto(request.parameters)
        found = await self._service.adopt_epoch(request.federation, request.epoch, parameters)
        return aggregator_pb2.AdoptEpochResponse(federation=codec.federation_to_proto(found))

    async def ListFederations(
        self, request: aggregator_pb2.ListFederationsRequest, context: Context
    ) -> aggregator_pb2.ListFederationsResponse:
        self._door.admit(context, Role.OPERATOR)
        found = await self._service.list_federations()
        return aggregator_pb2.ListFederationsResponse(federations=map(codec.federation_to_proto, found))

    async def GetFederation(
        self, request: aggregator_pb2.GetFederationRequest, context: Context
    ) -> aggregator_pb2.GetFederationResponse:
        self._door.admit(context, Role.OPERATOR, federation=request.federation)
        found = await self._service.get_federation(request.federation)
        return aggregator_pb2.GetFederationResponse(federation=codec.federation_to_proto(found))

    async def ListAgents(
        self, request: aggregator_pb2.ListAgentsRequest, context: Context
    ) -> AsyncIterator[aggregator_pb2.ListAgentsResponse]:
        self._door.admit(context, Role.OPERATOR, federation=request.federation)
        for agent in await self._service.list_agents(request.federation):
            yield aggregator_pb2.ListAgentsResponse(agent=codec.agent_to_proto(agent))

    async def ListRounds(
        self, request: aggregator_pb2.ListRoundsRequest, context: Context
    ) -> AsyncIterator[aggregator_pb2.ListRoundsResponse]:
        self._door.admit(context, Role.OPERATOR, federation=request.federation)
        for round_ in await self._service.list_rounds(request.federation):
            for part in codec.round_parts(round_):
                yield aggregator_pb2.ListRoundsResponse(round=part)

    async def WatchEvents(
        self, request: aggregator_pb2.WatchEventsRequest, context: Context
    ) -> AsyncIterator[aggregator_pb2.WatchEventsResponse]:
        self._door.admit(context, Role.OPERATOR, federation=request.federation)
        async with _closing(self._service.watch_events(request.federation, request.after)) as events:
            async for event in events:
                yield codec.event_to_proto(event)


class RoundServicer(aggregator_pb2_grpc.RoundServiceServicer):
    """What agents call; the agent is always the one in the caller's certificate.

    Args:
        service: the use cases.
        door: decides who may call.
        blobs: where the bytes of downloads are.
        silence_s: longest wait for the next message of an upload.
    """

    def __init__(
        self, service: AggregatorService, door: Door, blobs: BlobStore, *, silence_s: float = SILENCE_S
    ) -> None:
        self._service = service
        self._door = door
        self._blobs = blobs
        self._silence_s = silence_s

    async def GetTerms(
        self, request: aggregator_pb2.GetTermsRequest, context: Context
    ) -> aggregator_pb2.GetTermsResponse:
        self._door.admit(context, Role.AGENT, federation=request.federation)
        return codec.terms_to_proto(await self._service.get_terms(request.federation))

    async def RegisterAgent(
        self, request: aggregator_pb2.RegisterAgentRequest, context: Context
    ) -> aggregator_pb2.RegisterAgentResponse:
        identity = self._door.admit(context, Role.AGENT, federation=request.federation)
        check_peer_version(request.version)
        view = await self._service.register_agent(identity, codec.registration_from_proto(request))
        return aggregator_pb2.RegisterAgentResponse(version=own_version(), view=codec.view_to_proto(view))

    async def WatchFederation(
        self, request: aggregator_pb2.WatchFederationRequest, context: Context
    ) -> AsyncIterator[aggregator_pb2.WatchFederationResponse]:
        identity = self._door.admit(context, Role.AGENT, federation=request.federation)
        async with _closing(self._service.watch_view(identity, request.federation)) as views:
            async for view in views:
                self._door.admit(context, Role.AGENT, federation=request.federation)
                yield aggregator_pb2.WatchFederationResponse(view=codec.view_to_proto(view))

    async def GetUpload(
        self, request: aggregator_pb2.GetUploadRequest, context: Context
    ) -> aggregator_pb2.GetUploadResponse:
        identity = self._door.admit(context, Role.AGENT, federation=request.header.federation)
        status = await self._service.get_upload(identity, codec.ticket_from_proto(request.header))
        return aggregator_pb2.GetUploadResponse(staged_bytes=status.staged_bytes, complete=status.complete)

    async def Upload(
        self, _requests: AsyncIterator[aggregator_pb2.UploadRequest], context: Context
    ) -> aggregator_pb2.UploadResponse:
        with anyio.CancelScope() as silence, contextlib.closing(Patience(self._silence_s, silence.cancel)) as patience:
            return await self._take(_Messages(context, patience), context)
        raise Unavailable(
            f"upload: expected the next chunk within {self._silence_s:g} s, got none",
            hint="ask with GetUpload how many bytes are staged and continue there",
        )

    async def _take(self, messages: _Messages, context: Context) -> aggregator_pb2.UploadResponse:
        header = await messages.next()
        if not isinstance(header, aggregator_pb2.UploadHeader):
            raise MalformedPayload("upload: expected a header first, got something else", hint="send the header first")
        identity = self._door.admit(context, Role.AGENT, federation=header.federation)
        pieces = _Pieces(messages, context)
        ticket = codec.ticket_from_proto(header)
        async with self._service.transfer(identity, header.federation):
            receipt = await self._service.upload(identity, ticket, pieces, pieces.continue_at)
        return aggregator_pb2.UploadResponse(accepted_bytes=receipt.accepted_bytes, duplicate=receipt.duplicate)

    async def Download(
        self, request: aggregator_pb2.DownloadRequest, context: Context
    ) -> AsyncIterator[Any]:  # A DownloadResponse, then pieces; see `_payload_handlers`.
        identity = self._door.admit(context, Role.AGENT, federation=request.federation)
        async with self._service.transfer(identity, request.federation):
            download = await self._service.open_download(identity, codec.download_from_proto(request))
            yield aggregator_pb2.DownloadResponse(header=codec.download_to_proto(download))
            async for piece in _stored_pieces(self._blobs, download.blob, download.offset):
                yield piece

    async def ReportRound(
        self, request: aggregator_pb2.ReportRoundRequest, context: Context
    ) -> aggregator_pb2.ReportRoundResponse:
        identity = self._door.admit(context, Role.AGENT, federation=request.federation)
        await self._service.report_round(identity, request.federation, request.round, dict(request.metrics))
        return aggregator_pb2.ReportRoundResponse()

    async def LeaveRound(
        self, request: aggregator_pb2.LeaveRoundRequest, context: Context
    ) -> aggregator_pb2.LeaveRoundResponse:
        identity = self._door.admit(context, Role.AGENT, federation=request.federation)
        await self._service.leave_round(identity, request.federation, request.round, request.reason)
        return aggregator_pb2.LeaveRoundResponse()


def _closing(stream: AsyncIterator[T]) -> AbstractAsyncContextManager[AsyncGenerator[T, None]]:
    """The stream, closed at the end of the block, not when it is collected: closing tells that the peer is gone."""
    return contextlib.aclosing(cast("AsyncGenerator[T, None]", stream))


class _Messages:
    """The messages of one upload, each waited for with patience.

    They are read from the context and passed on at once, since the iterator that gRPC offers holds the last one, which
    adds up while many streams wait for their turns.
    """

    def __init__(self, context: Context, patience: Patience) -> None:
        self._context = context
        self._patience = patience

    async def next(self) -> Any:
        """What the next message brings (a `Part`), EOF at the end."""
        self._patience.begin()
        try:
            return await self._context.read()
        finally:
            self._patience.end()


class _Pieces:
    """The pieces of an upload; the sender is told to begin, and where, when the first one is asked for.

    A sender that waits for that leaves nothing in the transport's memory until then.
    """

    def __init__(self, messages: _Messages, context: Context) -> None:
        self._messages = messages
        self._context = context
        self._position: int | None = None
        self._staged_bytes = 0

    def continue_at(self, staged_bytes: int) -> None:
        """What the sender will be told."""
        self._staged_bytes = staged_bytes

    def __aiter__(self) -> _Pieces:
        return self

    async def __anext__(self) -> Piece:
        if self._position is None:
            await self._context.send_initial_metadata(((STAGED_BYTES, str(self._staged_bytes)),))
        piece = await self._messages.next()
        if piece is grpc.aio.EOF:
            raise StopAsyncIteration
        if not isinstance(piece, Piece):
            raise MalformedPayload("upload: expected chunks after the header, got something else")
        check_order(piece.offset, piece.data, piece.offset if self._position is None else self._position)
        self._position = piece.offset + len(piece.data)
        return piece


async def _stored_pieces(blobs: BlobStore, blob: Blob, offset: int) -> AsyncIterator[Piece]:
    """The pieces of a blob, read in a thread one by one."""
    stored = pieces(blobs.path(blob.key), offset)
    try:
        while (piece := await anyio.to_thread.run_sync(next, stored, None)) is not None:
            yield piece
    except FileNotFoundError as error:
        raise UnknownBlob(
            "payload: expected stored bytes, got none: a newer round has replaced them",
            hint="ask for the newest published round",
        ) from error


def _payload_handlers(servicer: RoundServicer) -> dict[str, Any]:
    """In place of the generated ones, which copy the bytes of chunks."""
    return {
        "Upload": grpc.stream_unary_rpc_method_handler(
            cast("Any", servicer.Upload),
            request_deserializer=reader(aggregator_pb2.UploadRequest),
            response_serializer=aggregator_pb2.UploadResponse.SerializeToString,
        ),
        "Download": grpc.unary_stream_rpc_method_handler(
            cast("Any", servicer.Download),
            request_deserializer=aggregator_pb2.DownloadRequest.FromString,
            response_serializer=serialize,
        ),
    }


def registration(
    service: AggregatorService, blobs: BlobStore, revocations: Revocations, *, silence_s: float = SILENCE_S
) -> Callable[[grpc.aio.Server], None]:
    """What adds both servicers to a server."""

    def register(server: grpc.aio.Server) -> None:
        door = Door(revocations)
        federations = FederationServicer(service, door)
        rounds = RoundServicer(service, door, blobs, silence_s=silence_s)
        aggregator_pb2_grpc.add_FederationServiceServicer_to_server(federations, server)
        aggregator_pb2_grpc.add_RoundServiceServicer_to_server(rounds, server)
        server.add_registered_method_handlers(ROUNDS, _payload_handlers(rounds))

    return register
