"""Server side of gRPC: one listening server with health and reflection."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from typing import Any, Final, cast

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from services.common.addresses import check_address, check_local, unix_path
from services.common.grpc_errors import ErrorInterceptor
from shelora.errors import InvalidConfiguration

Register = Callable[[grpc.aio.Server], None]
"""Adds servicers to the server, with the generated add_..._to_server functions."""

OPTIONS: Final[tuple[tuple[str, int], ...]] = (
    # Two processes on one port would share its connections at random.
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    # Left to itself the transport lets what a stream may send ahead grow to many MiB, and memory with the number of
    # agents that upload.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.experimental.tcp_max_read_chunk_size", 256 << 10),
    # Calls that came and were not looked at yet. From 1,000 on (the default) the transport breaks some of them off, and
    # an aggregator to which a fleet reconnects is that late for a moment.
    ("grpc.server.max_pending_requests", 20_000),
    ("grpc.server.max_pending_requests_hard_limit", 30_000),
)
"""Channel arguments of every server, but for the window of its streams."""

WINDOW_BYTES: Final = 512 << 10
"""What a stream may send before anybody reads it; while a message is read its whole length may come."""

LOOKAHEAD: Final = "grpc.http2.lookahead_bytes"
"""The channel argument for it."""

SERVING: Final = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING: Final = health_pb2.HealthCheckResponse.NOT_SERVING

_logger = structlog.get_logger(__name__)


class GrpcServer:
    """A grpc.aio server on one address, with the standard health and reflection services.

    Args:
        address: host:port (port 0: any free one) or unix:path (the socket gets mode 0600).
        credentials: TLS; None is for Unix sockets and loopback addresses only.
        register: adds the servicers.
        interceptors: run around every call, outermost first; an ErrorInterceptor is added in front unless one is given.
        maximum_concurrent_rpcs: calls beyond this are refused with RESOURCE_EXHAUSTED; None for no bound.
        window_bytes: what a stream may send before anybody reads it.

    Raises:
        InvalidConfiguration: not an address, or no credentials for an address that can be reached from elsewhere.

    Attributes:
        draining: set when drain() begins; handlers of long streams wait for it to end their stream.
    """

    def __init__(
        self,
        address: str,
        credentials: grpc.ServerCredentials | None,
        register: Register,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
        *,
        maximum_concurrent_rpcs: int | None = None,
        window_bytes: int = WINDOW_BYTES,
    ) -> None:
        self._address = check_address(address)
        if credentials is None:
            check_local(address, "gRPC server")
        self._credentials = credentials
        self._register = register
        self._interceptors = list(interceptors)
        if not any(isinstance(interceptor, ErrorInterceptor) for interceptor in self._interceptors):
            self._interceptors.insert(0, ErrorInterceptor())
        self._maximum_concurrent_rpcs = maximum_concurrent_rpcs
        self._options = (*OPTIONS, (LOOKAHEAD, window_bytes))
        self._server: grpc.aio.Server | None = None
        self._health = health.aio.HealthServicer()
        self._services: tuple[str, ...] = ()
        self.draining = asyncio.Event()

    async def start(self) -> int:
        """Listen and serve, with health SERVING until `report_ready` says otherwise.

        Returns:
            The bound port (a positive number without meaning for a Unix socket).

        Raises:
            InvalidConfiguration: the address cannot be bound.
        """
        server = grpc.aio.server(
            interceptors=self._interceptors,
            options=self._options,
            maximum_concurrent_rpcs=self._maximum_concurrent_rpcs,
        )
        names = _Names(server)
        self._register(cast("grpc.aio.Server", names))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        self._services = tuple(names.services)
        listed = (*names.services, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(listed, server)
        port = await listen(server, self._address, self._credentials)
        await self.report_ready(True)
        self._server = server
        _logger.info("gRPC server listens", address=self._address, port=port)
        return port

    async def report_ready(self, able: bool) -> None:
        """Say SERVING or NOT_SERVING for the server and each of its services; changes nothing once draining began."""
        for service in ("", *self._services):
            await self._health.set(service, SERVING if able else NOT_SERVING)

    async def drain(self, grace_s: float) -> None:
        """Say NOT_SERVING, refuse new calls, let running ones finish, then close.

        Args:
            grace_s: seconds that running calls have before they are cancelled.
        """
        self.draining.set()
        if self._server is None:
            return
        server, self._server = self._server, None
        await self._health.enter_graceful_shutdown()
        await server.stop(grace_s)
        _logger.info("gRPC server stopped", address=self._address)


async def listen(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None) -> int:
    """Bind a server's one address and start it.

    Args:
        server: not started yet.
        address: host:port or unix:path (the socket gets mode 0600).
        credentials: TLS, or None for none.

    Returns:
        The bound port.

    Raises:
        InvalidConfiguration: the address cannot be bound.
    """
    try:
        if credentials is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials)
    except RuntimeError:
        port = 0
    if port == 0:
        raise InvalidConfiguration(
            f"gRPC server: expected a free address, could not bind {address}",
            hint="stop the process that uses the port, or configure another one",
        )
    await server.start()
    path = unix_path(address)
    if path is not None:
        os.chmod(path, 0o600)
    return port


class _Names:
    """Passes handlers on to the server and notes the names of their services, for health and reflection."""

    def __init__(self, server: grpc.aio.Server) -> None:
        self._server = server
        self.services: list[str] = []

    def add_generic_rpc_handlers(self, handlers: Sequence[Any]) -> None:
        self.services += [handler.service_name() for handler in handlers]
        self._server.add_generic_rpc_handlers(handlers)

    def add_registered_method_handlers(self, service: str, handlers: Any) -> None:
        self._server.add_registered_method_handlers(service, handlers)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._server, name)
