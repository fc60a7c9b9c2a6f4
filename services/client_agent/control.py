"""The local control interface: what a fleet manager on the device may ask of its agent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, TypeAlias

import grpc

from services.client_agent.agent import Agent
from services.client_agent.codec import status_to_proto
from services.common.server import GrpcServer
from shelora.errors import InvalidConfiguration
from shelora.v1 import agent_pb2, agent_pb2_grpc

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class AgentControlServicer(agent_pb2_grpc.AgentControlServiceServicer):
    """A few lines an RPC: parse, call the agent, render."""

    def __init__(self, agent: Agent) -> None:
        """Serve one agent."""
        self._agent = agent

    async def GetStatus(self, request: agent_pb2.GetStatusRequest, context: Context) -> agent_pb2.GetStatusResponse:
        """State and figures."""
        return agent_pb2.GetStatusResponse(status=status_to_proto(self._agent.board.status))

    async def Start(self, request: agent_pb2.StartRequest, context: Context) -> agent_pb2.StartResponse:
        """Go on after a pause."""
        self._agent.resume()
        return agent_pb2.StartResponse(status=status_to_proto(self._agent.board.status))

    async def Pause(self, request: agent_pb2.PauseRequest, context: Context) -> agent_pb2.PauseResponse:
        """Begin nothing new."""
        self._agent.pause()
        return agent_pb2.PauseResponse(status=status_to_proto(self._agent.board.status))

    async def Stop(self, request: agent_pb2.StopRequest, context: Context) -> agent_pb2.StopResponse:
        """Leave the round and end the process."""
        await self._agent.stop(request.reason)
        return agent_pb2.StopResponse()

    async def ExportAdapter(
        self, request: agent_pb2.ExportAdapterRequest, context: Context
    ) -> agent_pb2.ExportAdapterResponse:
        """Copy a saved adapter."""
        if not request.folder or not Path(request.folder).is_absolute():
            raise InvalidConfiguration(
                f"expected an absolute folder, got {request.folder!r}", hint="name a folder of this device"
            )
        folder, number = await asyncio.to_thread(self._agent.export_adapter, request.round, Path(request.folder))
        return agent_pb2.ExportAdapterResponse(folder=str(folder), round=number)

    async def WatchProgress(
        self, request: agent_pb2.WatchProgressRequest, context: Context
    ) -> AsyncIterator[agent_pb2.WatchProgressResponse]:
        """Progress as it happens."""
        async for status in self._agent.watch():
            yield agent_pb2.WatchProgressResponse(
                status=status_to_proto(status), fraction=status.fraction, detail=status.detail[:200]
            )


def control_server(agent: Agent) -> GrpcServer:
    """The control server of one agent, on its configured local address."""
    servicer = AgentControlServicer(agent)
    return GrpcServer(
        agent.config.control_address,
        None,
        lambda server: agent_pb2_grpc.add_AgentControlServiceServicer_to_server(servicer, server),
    )
