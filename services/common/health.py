"""Health that tells the truth: one readiness check, told to every gRPC server; and a server for probes without TLS."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from typing import Any, Final, Protocol

import anyio
import grpc
import structlog
from grpc_health.v1 import health, health_pb2_grpc

from services.common.addresses import check_address
from services.common.clock import Clock
from services.common.grpc_errors import translate
from services.common.server import NOT_SERVING, OPTIONS, SERVING, listen
from shelora.errors import InternalFault, Unavailable

Ready = Callable[[], Awaitable[Mapping[str, Any]]]
"""Answers with details when the service can work; raises, or answers {"ready": False}, when it cannot."""

CHECK_TIMEOUT_S: Final = 3.0
"""A readiness check that takes longer has failed."""

REFRESH_S: Final = 2.0
"""Pause between two checks; with the longest check a state is never older than 5 seconds."""

LIVENESS: Final = "liveness"
READINESS: Final = "readiness"
_CALLS: Final = 256

_logger = structlog.get_logger(__name__)


class Listener(Protocol):
    """Tells its callers whether the service can work."""

    async def report_ready(self, able: bool) -> None:
        """Take the newest state."""
        ...


class HealthServer:
    """gRPC without TLS on any address that serves grpc.health.v1 and nothing else, for probes such as a kubelet's.

    "" and "liveness" are SERVING until it is drained, "readiness" is what was reported last, at first NOT_SERVING.

    Args:
        address: host:port (port 0: any free one) or unix:path.

    Raises:
        InvalidConfiguration: not an address.
    """

    def __init__(self, address: str) -> None:
        self._address = check_address(address)
        self._server: grpc.aio.Server | None = None
        self._health = health.aio.HealthServicer()

    async def start(self) -> int:
        """Listen and serve; answers the bound port.

        Raises:
            InvalidConfiguration: the address cannot be bound.
        """
        server = grpc.aio.server(options=OPTIONS, maximum_concurrent_rpcs=_CALLS)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        await self.report_ready(False)
        await self._health.set(LIVENESS, SERVING)
        port = await listen(server, self._address, None)
        self._server = server
        _logger.info("health server listens", address=self._address, port=port)
        return port

    async def report_ready(self, able: bool) -> None:
        """Say SERVING or NOT_SERVING for "readiness"."""
        await self._health.set(READINESS, SERVING if able else NOT_SERVING)

    async def drain(self, grace_s: float) -> None:
        """Say NOT_SERVING for everything, then close.

        Args:
            grace_s: seconds that running calls have before they are cancelled.
        """
        if self._server is None:
            return
        server, self._server = self._server, None
        await self._health.enter_graceful_shutdown()
        await server.stop(grace_s)


async def look(ready: Ready) -> dict[str, Any]:
    """Check once.

    Returns:
        The details of `ready` with "ready" true or false; or false with code and message when it raised or took more
        than `CHECK_TIMEOUT_S`.
    """
    try:
        with anyio.fail_after(CHECK_TIMEOUT_S):
            details = dict(await ready())
    except TimeoutError:
        return {"ready": False, "code": Unavailable.code, "message": "no answer in time"}
    except Exception as error:
        known = translate(error) or InternalFault(f"{type(error).__name__} in the readiness check")
        return {"ready": False, "code": known.code, "message": str(known)}
    return {**details, "ready": bool(details.get("ready", True))}


class Readiness:
    """Checks regularly whether the service can work and tells the listeners, so that all ports say the same.

    Args:
        ready: the check behind /readyz.
        listeners: are told after every check.
        clock: waits between two checks.
    """

    def __init__(self, ready: Ready, listeners: Iterable[Listener], clock: Clock) -> None:
        self._ready = ready
        self._listeners = tuple(listeners)
        self._clock = clock
        self._able = True

    @contextlib.asynccontextmanager
    async def followed(self) -> AsyncIterator[None]:
        """Inside the block the listeners know the state; at its end, where draining begins, they hear NOT_SERVING."""
        await self._refresh()
        task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            task.cancel()
            with anyio.CancelScope(shield=True):
                await self._tell(False)
                await asyncio.wait({task})

    async def _run(self) -> None:
        while True:
            await self._clock.sleep(REFRESH_S)
            await self._refresh()

    async def _refresh(self) -> None:
        found = await look(self._ready)
        before, self._able = self._able, found["ready"]
        if before and not self._able:
            _logger.warning("not ready", details=found)
        elif self._able and not before:
            _logger.info("ready again")
        await self._tell(self._able)

    async def _tell(self, able: bool) -> None:
        for listener in self._listeners:
            await listener.report_ready(able)
