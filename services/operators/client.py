"""The services as operators call them: domain values in and out, errors of the tree, no protobuf outside."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final

import grpc

from services.common.channel import call, receive_stream
from services.common.codec import parameters_to_proto
from services.operators.codec import (
    agent_from_proto,
    event_from_proto,
    federation_from_proto,
    progress_from_proto,
    rounds_from_proto,
    spec_to_proto,
)
from services.operators.domain import AgentProgress, Event, Federation, FederationSpec, RegisteredAgent, Round
from shelora.he.parameters import CkksParameters
from shelora.v1 import agent_pb2, agent_pb2_grpc, aggregator_pb2, aggregator_pb2_grpc

DEADLINE_S: Final = 20.0
"""How long a call to the aggregator may take, retries of the channel included."""


class FederationClient:
    """Calls to the aggregator under the operator's certificate.

    Every method raises the errors of the tree that the aggregator raised, or PeerUnreachable.

    Args:
        channel: mutual TLS channel to the aggregator; stays the caller's to close.
        deadline_s: how long each call may take.
    """

    def __init__(self, channel: grpc.aio.Channel, *, deadline_s: float = DEADLINE_S) -> None:
        self._stub = aggregator_pb2_grpc.FederationServiceStub(channel)
        self._deadline_s = deadline_s

    async def create(self, spec: FederationSpec) -> Federation:
        """Create a federation; the same specification again returns the existing one."""
        request = aggregator_pb2.CreateFederationRequest(spec=spec_to_proto(spec))
        response = await call(self._stub.CreateFederation, request, timeout_s=self._deadline_s)
        return federation_from_proto(response.federation)

    async def start(self, federation: str, more_rounds: int = 0) -> Federation:
        """Start a federation, or start it again with more rounds after it finished."""
        request = aggregator_pb2.StartFederationRequest(federation=federation, more_rounds=more_rounds)
        response = await call(self._stub.StartFederation, request, timeout_s=self._deadline_s)
        return federation_from_proto(response.federation)

    async def stop(self, federation: str, reason: str) -> Federation:
        """Stop a federation; agents are told to leave."""
        request = aggregator_pb2.StopFederationRequest(federation=federation, reason=reason)
        response = await call(self._stub.StopFederation, request, timeout_s=self._deadline_s)
        return federation_from_proto(response.federation)

    async def adopt(self, federation: str, epoch: int, parameters: CkksParameters) -> Federation:
        """Move a federation to another key epoch at the next round boundary."""
        request = aggregator_pb2.AdoptEpochRequest(
            federation=federation, epoch=epoch, parameters=parameters_to_proto(parameters)
        )
        response = await call(self._stub.AdoptEpoch, request, timeout_s=self._deadline_s)
        return federation_from_proto(response.federation)

    async def list_all(self) -> list[Federation]:
        """All federations of the aggregator."""
        request = aggregator_pb2.ListFederationsRequest()
        response = await call(self._stub.ListFederations, request, timeout_s=self._deadline_s)
        return [federation_from_proto(federation) for federation in response.federations]

    async def get(self, federation: str) -> Federation:
        """State, plan and running round."""
        request = aggregator_pb2.GetFederationRequest(federation=federation)
        response = await call(self._stub.GetFederation, request, timeout_s=self._deadline_s)
        return federation_from_proto(response.federation)

    async def agents(self, federation: str) -> list[RegisteredAgent]:
        """Registered agents by name."""
        request = aggregator_pb2.ListAgentsRequest(federation=federation)
        responses = receive_stream(self._stub.ListAgents, request, timeout_s=self._deadline_s)
        return [agent_from_proto(response.agent) async for response in responses]

    async def rounds(self, federation: str) -> list[Round]:
        """Rounds with their figures, oldest first."""
        request = aggregator_pb2.ListRoundsRequest(federation=federation)
        responses = receive_stream(self._stub.ListRounds, request, timeout_s=self._deadline_s)
        return rounds_from_proto([response.round async for response in responses])

    async def events(self, federation: str, after: int = 0) -> AsyncIterator[Event]:
        """Events as they happen, from the first kept one with a greater sequence number than `after`."""
        request = aggregator_pb2.WatchEventsRequest(federation=federation, after=after)
        async for response in receive_stream(self._stub.WatchEvents, request, timeout_s=None):
            yield event_from_proto(response)


class AgentControlClient:
    """Calls to an agent on this machine through its control interface.

    Args:
        channel: to the agent's control socket; stays the caller's to close.
    """

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = agent_pb2_grpc.AgentControlServiceStub(channel)

    async def watch(self) -> AsyncIterator[AgentProgress]:
        """Progress as it happens, the present state first; ends when the agent ends."""
        request = agent_pb2.WatchProgressRequest()
        async for response in receive_stream(self._stub.WatchProgress, request, timeout_s=None):
            yield progress_from_proto(response)
