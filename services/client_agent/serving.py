"""What an agent serves on its own machine: the control interface, and health and metrics over HTTP if configured."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

from services.client_agent.agent import Agent
from services.client_agent.control import control_server

GRACE_S = 1.0


@contextlib.asynccontextmanager
async def serving(agent: Agent) -> AsyncIterator[dict[str, str | int]]:
    """Serve until the block ends.

    Yields:
        Where, for the ready file: control, control_port and, if configured, the port ops.

    Raises:
        InvalidConfiguration: an address cannot be bound.
    """
    async with contextlib.AsyncExitStack() as stack:
        ports: dict[str, str | int] = {"control": agent.config.control_address}
        if agent.config.ops_listen is not None:
            ports["ops"] = await stack.enter_async_context(_serving_ops(agent, agent.config.ops_listen))
        server = control_server(agent)
        ports["control_port"] = await server.start()
        stack.push_async_callback(server.drain, GRACE_S)
        yield ports


@contextlib.asynccontextmanager
async def _serving_ops(agent: Agent, address: str) -> AsyncIterator[int]:
    from services.common.ops import ops_app, serve_http  # a device that serves no HTTP loads no web framework

    async def ready() -> Mapping[str, Any]:
        return agent.board.readiness()

    async with serve_http(ops_app(ready, agent.metrics.registry), address) as port:
        yield port
