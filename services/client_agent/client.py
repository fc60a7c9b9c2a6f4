"""The caller's side of an agent's local control interface."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from pathlib import Path

import grpc

from services.client_agent.codec import status_from_proto
from services.client_agent.domain import Status
from services.common.channel import call, receive_stream
from shelora.v1 import agent_pb2, agent_pb2_grpc

_TIMEOUT_S = 30.0


class ControlClient:
    """Calls to one running agent. Errors are those of the tree; PeerUnreachable when no agent listens."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        """Use an open channel to the agent's control address; the caller closes it."""
        self._stub = agent_pb2_grpc.AgentControlServiceStub(channel)

    async def status(self) -> Status:
        """State and figures."""
        answer = await call(self._stub.GetStatus, agent_pb2.GetStatusRequest(), timeout_s=_TIMEOUT_S)
        return status_from_proto(answer.status)

    async def start(self) -> Status:
        """Go on after a pause."""
        answer = await call(self._stub.Start, agent_pb2.StartRequest(), timeout_s=_TIMEOUT_S)
        return status_from_proto(answer.status)

    async def pause(self) -> Status:
        """Finish the step at hand, then do nothing."""
        answer = await call(self._stub.Pause, agent_pb2.PauseRequest(), timeout_s=_TIMEOUT_S)
        return status_from_proto(answer.status)

    async def stop(self, reason: str) -> None:
        """Leave the running round and end the process."""
        await call(self._stub.Stop, agent_pb2.StopRequest(reason=reason), timeout_s=_TIMEOUT_S)

    async def export_adapter(self, round_number: int, folder: Path) -> tuple[Path, int]:
        """Copy a saved PEFT adapter into an absolute folder; round 0 means the newest. Returns folder and round."""
        request = agent_pb2.ExportAdapterRequest(round=round_number, folder=str(folder))
        answer = await call(self._stub.ExportAdapter, request, timeout_s=_TIMEOUT_S)
        return Path(answer.folder), int(answer.round)

    async def watch(self) -> AsyncGenerator[Status, None]:
        """The status now and after every change, until the agent ends."""
        request = agent_pb2.WatchProgressRequest()
        async with contextlib.aclosing(receive_stream(self._stub.WatchProgress, request, timeout_s=None)) as messages:
            async for message in messages:
                yield status_from_proto(message.status, message.fraction, message.detail)
